"""Chance by shifting: hold the experts against another part of the text, everything else as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt


def shifted(column_T: npt.NDArray[Any], num_shifts: int, seed: int) -> Iterator[npt.NDArray[Any]]:
    """The column turned round by different random numbers of tokens, the end joined to the beginning.

    Neighbouring tokens are alike and so are their experts: shuffling single tokens would break that, call chance too
    small and everything significant. A turned column keeps it, and keeps how often everything occurs.

    Args:
        num_shifts: columns to give, at most; there are only as many as there are tokens but one.
        seed: of the random numbers.
    """
    most = max(0, len(column_T) - 1)
    if most:
        steps = np.random.default_rng(seed).choice(most, size=min(num_shifts, most), replace=False)
        for step in steps.tolist():
            yield np.roll(column_T, step + 1)


def p_value(observed: float, by_chance: npt.ArrayLike) -> float:
    """``(1 + #{chance that reaches what was observed}) / (1 + #chance)``; NaN where chance was not tried.

    Source:
        Phipson and Smyth 2010, equation 2: never 0, since what was observed is one of the possible draws.
    """
    drawn = np.asarray(by_chance, dtype=np.float64)
    # The tiny slack keeps rounding from splitting ties.
    return float((1 + (drawn >= observed - 1e-12).sum()) / (1 + len(drawn))) if len(drawn) else float("nan")
