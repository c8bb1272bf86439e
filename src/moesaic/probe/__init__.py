"""Measure what only a model can tell: what experts are worth, how alike they are, how close their choices were.

Names load on first use, so that importing a part pays for no other.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.probe.alike import Likeness, likeness
    from moesaic.probe.edges import Flips, LayerMargins, Margins, margins
    from moesaic.probe.text import HeldOut
    from moesaic.probe.worth import Causal, Change, Effect, causal, changes

_HOME = {
    "Causal": "worth",
    "Change": "worth",
    "Effect": "worth",
    "Flips": "edges",
    "HeldOut": "text",
    "LayerMargins": "edges",
    "Likeness": "alike",
    "Margins": "edges",
    "causal": "worth",
    "changes": "worth",
    "likeness": "alike",
    "margins": "edges",
}

__all__ = [
    "Causal",
    "Change",
    "Effect",
    "Flips",
    "HeldOut",
    "LayerMargins",
    "Likeness",
    "Margins",
    "causal",
    "changes",
    "likeness",
    "margins",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"moesaic.probe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
