"""Named sets of settings, for commands that must always do the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.core.errors import ConfigError

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # `make demo`: two models, then the report, in under six minutes on two CPU cores.
    "demo": {
        "recipe": "mixtral",
        "data": "builtin",
        "tokenizer": "bytes",
        "backbone": "llama",
        "width": 128,
        "layers": 4,
        "heads": 4,
        "hidden": 256,
        "num_experts": 8,
        "top_k": 2,
        "context": 256,
        "batch_size": 16,
        "steps": 300,
        "lr": 3e-3,
        "warmup": 30,
        "seed": 0,
        "twin": True,
        "eval_every": 60,
        "eval_tokens": 8192,
        "save_every": 150,
        "log_every": 5,
    },
}


def preset(name: str) -> dict[str, Any]:
    """Give the settings of a preset.

    Raises:
        ConfigError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}. Pick one of them.")
    return dict(PRESETS[name])
