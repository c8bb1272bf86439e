"""Work on rows a part at a time, so that little is held, and parts side by side on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache

import numpy as np
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from moesaic.classic.tree import Floats

_side_by_side: ContextVar[int] = ContextVar("side_by_side", default=1)

_PART_NUMBERS = 2**20
"""Numbers that are held for a part: 8 MiB, which was fastest where parts of 1 to 8 MiB were tried."""
_FEWEST_ROWS = 64


@contextmanager
def all_cores() -> Iterator[None]:
    """Work on parts of the rows side by side, on as many cores as linear algebra may use outside.

    Inside, linear algebra takes one core for each part. Where matrices are small its own threads mostly wait for each
    other, and on a busy machine for everybody: fits of a fraction of a second took minutes.
    """
    libraries = _linear_algebra()
    allowed = max((one.num_threads for one in libraries.lib_controllers), default=1)
    before = _side_by_side.set(max(allowed, _side_by_side.get()))
    try:
        with libraries.limit(limits=1):
            yield
    finally:
        _side_by_side.reset(before)


@cache
def _linear_algebra() -> ThreadpoolController:
    """The libraries that numpy and scipy have loaded: looking for them takes milliseconds."""
    return ThreadpoolController().select(user_api="blas")


def summed(num_rows: int, numbers_of_row: int, of: Callable[[slice], tuple[Floats, ...]]) -> tuple[Floats, ...]:
    """Add up what parts of the rows give, in their order: the sum does not depend on the number of cores.

    Args:
        num_rows: of all.
        numbers_of_row: that are held for each row, from which the size of a part follows.
        of: from a part, one of no rows where there are none, to what is to be added up.
    """
    each = _each_part(num_rows, numbers_of_row, of)
    total = next(each)
    for one in each:
        for whole, part in zip(total, one, strict=True):
            whole += part
    return total


def gathered(num_rows: int, numbers_of_row: int, of: Callable[[slice], tuple[Floats, ...]]) -> tuple[Floats, ...]:
    """Put what parts of the rows give below each other; the arguments are those of :func:`summed`."""
    return tuple(map(np.concatenate, zip(*_each_part(num_rows, numbers_of_row, of), strict=True)))


def _each_part(
    num_rows: int, numbers_of_row: int, of: Callable[[slice], tuple[Floats, ...]]
) -> Iterator[tuple[Floats, ...]]:
    size = max(_FEWEST_ROWS, _PART_NUMBERS // numbers_of_row)
    parts = [slice(start, min(start + size, num_rows)) for start in range(0, max(1, num_rows), size)]
    count = min(_side_by_side.get(), len(parts))
    if count == 1:
        yield from map(of, parts)
        return
    with ThreadPoolExecutor(count) as pool:
        # Settings such as numpy's errstate belong to a context, and threads have none of ours.
        running = [pool.submit(copy_context().run, of, part) for part in parts]
        running.reverse()
        # Popped, so that what has been used is let go.
        yield from (running.pop().result() for _ in parts)
