"""Put a model back to how it was adopted, or not, at some earlier time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from moesaic.hf.native.found import is_interface

_KEPT = ("_moesaic", "_moesaic_before")


def undo_to_now(model: nn.Module) -> Callable[[], None]:
    """What gives every module the class and the settings that it has now, and the experts to who runs them now."""
    parts = {
        part: (part.__class__, {name: part.__dict__[name] for name in _KEPT if name in part.__dict__})
        for part in model.modules()
    }
    configs: list[Any] = [cast(Any, part).config for part in model.modules() if is_interface(part)]
    runs = [config._experts_implementation_internal for config in configs]

    def undo() -> None:
        for part, (kind, kept) in parts.items():
            part.__class__ = kind
            for name in _KEPT:
                part.__dict__.pop(name, None)
            part.__dict__.update(kept)
        for config, run in zip(configs, runs, strict=True):
            config._experts_implementation_internal = run

    return undo
