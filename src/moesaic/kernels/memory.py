"""Memory that costs little to touch: in large pages, and kept from step to step."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections import defaultdict
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

# From a size that depends on what came before, and is 32 MiB at most, glibc gives freed memory back to the system.
LARGE_BYTES = 16 * 2**20


def large_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory that costs little to touch for the first time.

    Linux hands memory out in pages of 4 KiB, each at the price of an interrupt on first touch, and each has to be
    cleared. The weight gradients of 256 experts are made anew in every step: 134 MB take 41 ms to touch so, 8 ms in
    pages of 2 MiB, and nothing if they are those of the step before. Where the system has no such pages, or for
    small tensors, this is ``torch.empty``.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size_bytes < LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_kept(os.getpid()).take(size_bytes), dtype=dtype, count=math.prod(shape)).view(shape)


class _KeptPages:
    """Pages that tensors have let go of: the next of that size take them; the system may, as soon as it needs them."""

    def __init__(self) -> None:
        # No lock: a tensor may be let go of at any moment, also while this thread is in here. Lists need none.
        self._idle: defaultdict[int, list[mmap.mmap]] = defaultdict(list)

    def take(self, size_bytes: int) -> memoryview:
        """Memory of at least so many bytes, which comes back when nobody holds what is returned."""
        # Loads differ from step to step, and sizes with them: an eighth of an octave apart they are the same.
        step = 1 << (size_bytes.bit_length() - 4)
        size_bytes = -(-size_bytes // step) * step
        try:
            pages = self._idle[size_bytes].pop()
        except IndexError:
            pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _advise(pages, mmap.MADV_HUGEPAGE)
        view = memoryview(pages)
        weakref.finalize(view, self._give_back, pages).atexit = False
        return view

    def _give_back(self, pages: mmap.mmap) -> None:
        _advise(pages, mmap.MADV_FREE)
        self._idle[len(pages)].append(pages)


def _advise(pages: mmap.mmap, wish: int) -> None:
    """Tell the system what would help; kernels built without it refuse, and the memory is as good as any."""
    with suppress(OSError):
        pages.madvise(wish)


@cache
def _kept(_process: int) -> _KeptPages:
    """Those of this process; a forked one begins with none."""
    return _KeptPages()
