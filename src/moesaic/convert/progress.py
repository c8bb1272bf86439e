"""Tell whoever draws a progress bar how far a conversion is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Draw = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

_DRAW: ContextVar[Draw | None] = ContextVar("moesaic.convert.draw", default=None)

Item = TypeVar("Item")


@contextmanager
def drawing(draw: Draw) -> Iterator[None]:
    """Call ``draw`` for each step of the conversions within, in this thread."""
    token = _DRAW.set(draw)
    try:
        yield
    finally:
        _DRAW.reset(token)


def tracked(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Give items one by one, and tell before each how many are done."""
    draw = _DRAW.get() or _nothing
    done = 0
    draw(what, done, total)
    for item in items:
        yield item
        done += 1
        draw(what, done, total)


def _nothing(_what: str, _done: int, _total: int) -> None:
    pass
