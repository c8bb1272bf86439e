"""Shapes of published models as data, and what follows from them: parameters, FLOPs, memory. Needs no torch.

``names()`` lists them, ``get(name)`` gives a :class:`ModelShape`.
"""

from __future__ import annotations

import difflib

from moesaic.core.errors import ConfigError
from moesaic.zoo import cost, count
from moesaic.zoo.cost import Memory
from moesaic.zoo.layers import (
    Attention,
    Dense,
    Experts,
    LatentAttention,
    Layer,
    LinearAttention,
    Lstm,
    Mamba,
    Other,
)
from moesaic.zoo.models import MODELS
from moesaic.zoo.parts import Parts
from moesaic.zoo.published import Published
from moesaic.zoo.shape import ModelShape

__all__ = [
    "Attention",
    "Dense",
    "Experts",
    "LatentAttention",
    "Layer",
    "LinearAttention",
    "Lstm",
    "Mamba",
    "Memory",
    "ModelShape",
    "Other",
    "Parts",
    "Published",
    "cost",
    "count",
    "get",
    "names",
]

_TABLE = {shape.name: shape for shape in MODELS}


def names() -> list[str]:
    """The names of all shapes, oldest house first."""
    return list(_TABLE)


def get(name: str) -> ModelShape:
    """The shape of a published model.

    Args:
        name: one of :func:`names`, such as "mixtral-8x7b".

    Raises:
        ConfigError: if there is none of that name; says which are near.
    """
    if name not in _TABLE:
        near = difflib.get_close_matches(name, _TABLE, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "moesaic zoo lists them."
        raise ConfigError(f"A model's name must be one of the zoo's {len(_TABLE)}, got {name!r}. {hint}")
    return _TABLE[name]
