"""The processes that train together: ``torchrun`` starts one per device, and rank 0 writes and speaks for all."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from moesaic.core.errors import StoppedElsewhereError

T = TypeVar("T")


def join() -> None:
    """Meet the other processes if ``torchrun`` started several; does nothing if they have met, or there are none."""
    if "LOCAL_RANK" in os.environ and not _has_met():
        from accelerate import PartialState  # type: ignore[import-untyped]

        # As transformers.TrainingArguments will, which then finds it done: gloo on CPUs, NCCL on GPUs.
        PartialState(cpu=not torch.cuda.is_available())
        # Gloo's threads abort a process that ends while they wait.
        atexit.register(_part)


def count() -> int:
    """Give how many ranks train together."""
    return dist.get_world_size() if _has_met() else 1


def own() -> int:
    """Give this process's rank."""
    return dist.get_rank() if _has_met() else 0


def is_first() -> bool:
    """Tell whether this process is rank 0, which writes and speaks."""
    return own() == 0


def any_of(mine: bool, device: torch.device | None = None) -> bool:
    """Tell every rank whether something is true on any; all ranks call it at the same point."""
    if count() == 1:
        return mine
    flag = torch.tensor(int(mine), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def gathered(mine: T) -> list[T]:
    """Give every rank's value to every rank, in order of rank; all ranks call it at the same point."""
    if count() == 1:
        return [mine]
    everyone: list[T | None] = [None] * count()
    dist.all_gather_object(everyone, mine)
    return cast(list[T], everyone)


@contextmanager
def together() -> Iterator[None]:
    """Leave the block when all ranks have; if one fails in it, none goes on.

    All ranks enter it at the same point, and nothing inside waits for another rank. It must not be nested.

    Raises:
        StoppedElsewhereError: on the ranks that another one speaks for; that one raises its own error.
    """
    if count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = gathered(error is not None)
    if True not in failed:
        return
    speaker = failed.index(True)
    if error is not None and speaker == own():
        raise error
    raise StoppedElsewhereError(f"Rank {speaker} stopped and says why; rank {own()} stops with it.") from error


def from_first(action: Callable[[], T]) -> T:
    """Do something on rank 0 alone, and give its result to all.

    Raises:
        StoppedElsewhereError: on the other ranks, if it fails.
    """
    mine: T | None = None
    with together():
        if is_first():
            mine = action()
    return cast(T, gathered(mine)[0])


def _has_met() -> bool:
    return dist.is_available() and dist.is_initialized()


def _part() -> None:
    if _has_met():
        dist.destroy_process_group()
