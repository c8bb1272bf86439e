"""Many small pieces of work, each on one core, in place of one core's worth of each piece after the other."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from heapq import heapreplace

import torch

# By how much the busiest worker may have more to do than the mean.
UNEVEN = 1.05


def share_out(sizes: Sequence[int], num_workers: int) -> tuple[list[int], list[int]]:
    """Tell which pieces of work all cores should do together, one after the other, and which each core by itself.

    As many as possible by themselves, as long as nobody waits long for the last. Without workers, none.

    Args:
        sizes: of the pieces, in any unit.
        num_workers: cores.
    Returns:
        Places of ``sizes``, of each kind the largest first.
    """
    largest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    for cut in range(len(sizes)) if num_workers else ():
        apart = largest_first[cut:]
        busy = [0] * num_workers
        for i in apart:
            # The next piece goes to whoever is free first.
            heapreplace(busy, busy[0] + sizes[i])
        if max(busy) * num_workers <= UNEVEN * sum(busy):
            return largest_first[:cut], apart
    return largest_first, []


def side_by_side(start: Callable[[], Callable[[int], None]], items: Iterable[int]) -> None:
    """Work on each item, on as many at once as PyTorch has threads, each on a single core.

    PyTorch lets go of Python's lock inside its operations, so threads run side by side; and products too small to be
    split well over cores run whole, each in the cache of its own core. Items are taken in the order given, by whoever
    is free: the result must not depend on who does what. No gradient graph is recorded.

    Args:
        start: called once by each worker; gives what it does with an item.
        items: the pieces of work, the longest first.
    Raises:
        Exception: what the work raised.
    """
    waiting = iter(items)
    # Threads do not take the caller's mode over, and tensors made in inference mode may be written to in no other.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def share() -> None:
        with mode():
            work = start()
            for item in waiting:
                work(item)

    num_workers = torch.get_num_threads()
    # A mode sees what its own thread does: counters of operations, tracers and fake tensors need it all here.
    if num_workers == 1 or torch._C._len_torch_dispatch_stack() > 0:
        share()
        return
    for done in [_workers(num_workers, os.getpid()).submit(share) for _ in range(num_workers)]:
        done.result()


@cache
def _workers(num_workers: int, _process: int) -> ThreadPoolExecutor:
    """Threads on which PyTorch's operations use one core each. A forked process has none of them and makes its own."""
    started = threading.Barrier(num_workers + 1)

    def start() -> None:
        # A thread takes the number set last when it first asks, and would ask after it was set.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    workers = ThreadPoolExecutor(num_workers, thread_name_prefix="moesaic", initializer=start)
    for _ in range(num_workers):
        workers.submit(lambda: None)
    started.wait()
    # The number holds for the thread that sets it, and is the first one of threads yet to come.
    torch.set_num_threads(num_workers)
    return workers
