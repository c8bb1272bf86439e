"""Paths in a model as they were before PEFT wrapped parts of it."""

from __future__ import annotations

import re

from torch import nn

_WRAPPING = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")


def plain_path(path: str) -> str:
    """A path without the wrappers that PEFT puts around what it adapts or trains a copy of.

    A part and its copy have one plain path; in ``named_modules()``, the copy that trains comes last.
    """
    return _WRAPPING.sub("", path)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is PEFT's, around one that it adapts: what its weights say is not what it computes."""
    return hasattr(module, "get_base_layer")
