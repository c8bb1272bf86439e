"""Look inside: a routing trace becomes figures that mean something, and one page to read them on."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.lens.page import report as report

__all__ = ["report"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("moesaic.lens.page"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
