"""Fair times: everybody once in each round, in a turning order, after a warm-up."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

import torch

from moesaic.core.errors import ConfigError

MIN_ROUNDS = 5
# What took no longer in its last turn runs once unseen before the next.
SETTLE_S = 2.0


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One thing to time.

    Attributes:
        run: what the clock sees.
        before: done before each run, unseen by the clock.
    """

    run: Callable[[], object]
    before: Callable[[], object] = _nothing


Clock = Callable[[Callable[[], object]], float]


def clock_of(device: torch.device) -> Clock:
    """A function that runs something and gives the seconds it took there."""
    return _seconds_on_cuda if device.type == "cuda" else _seconds


def interleaved(
    works: Mapping[str, Work],
    *,
    rounds: int,
    clock: Clock,
    warm_up: int = 1,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, tuple[float, ...]]:
    """Seconds of each work in each round.

    A machine gets faster and slower by the minute; neighbours in one round see the same machine, so their ratio is
    taken round by round. The order turns by one place a round: nobody always follows the same neighbour's caches.
    Before its second turn and all later ones each runs once unseen, as it would after its own last step and not after a
    neighbour's: oneDNN keeps the code of the last 1,024 shapes of products, and a neighbour that meets many shapes
    would cost the next one 0.7 ms for each of its own.

    Args:
        works: by name.
        rounds: that count.
        clock: see :func:`clock_of`.
        warm_up: rounds before them that do not.
        say: told what is being done.
    Raises:
        ConfigError: if there are fewer than 5 rounds.
    """
    if rounds < MIN_ROUNDS:
        raise ConfigError(f"rounds must be at least {MIN_ROUNDS}, got {rounds}. A median of fewer says little.")
    names = list(works)
    found: dict[str, list[float]] = {name: [] for name in names}
    lasted_s: dict[str, float] = {}
    with _no_collections():
        for turn in range(-warm_up, rounds):
            at = turn % len(names) if names else 0
            for name in names[at:] + names[:at]:
                say(f"{name}, {'warm-up' if turn < 0 else f'round {turn + 1} of {rounds}'}")
                if lasted_s.get(name, inf) < SETTLE_S:
                    works[name].before()
                    works[name].run()
                works[name].before()
                seconds = lasted_s[name] = clock(works[name].run)
                if turn >= 0:
                    found[name].append(seconds)
    return {name: tuple(values) for name, values in found.items()}


def ratios(values: Sequence[float], of: Sequence[float]) -> tuple[float, ...]:
    """Round by round."""
    return tuple(value / other for value, other in zip(values, of, strict=True))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lowest, median, highest."""
    return min(values), median(values), max(values)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_cuda(run: Callable[[], object]) -> float:
    # Typed loosely: PyTorch's CPU build has no annotations for it.
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@contextmanager
def _no_collections():  # type: ignore[no-untyped-def]
    """No garbage collection while the clock runs; it would hit whoever happens to be there."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
