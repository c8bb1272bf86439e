"""Sampling: whole sequences, so that neighbours stay neighbours, and without a list of what was drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.core.errors import ConfigError


def check_share(sample: float) -> None:
    """Refuse a share that is none.

    Raises:
        ConfigError: if ``sample`` is not above 0 and at most 1.
    """
    if not 0 < sample <= 1:
        raise ConfigError(f"sample must be above 0 and at most 1, got {sample}. Give the share of sequences to keep.")


def in_sample(sequence_N: npt.NDArray[Any], sample: float, sampled: float | None) -> npt.NDArray[np.bool_]:
    """True where a row's sequence is kept: the same for all rows of a sequence, whatever part of a trace they are in.

    Args:
        sequence_N: numbers of the sequences.
        sample: how many of them to keep, as a share; every sequence is kept with this probability.
        sampled: the share that was kept before, so that sampling a sample draws anew; None where it is not known.
    """
    salt = np.float64(-1 if sampled is None else sampled).view(np.uint64)
    # The finaliser of SplitMix64 (Steele et al. 2014): neighbouring numbers become unrelated 64-bit ones.
    mixed_N = sequence_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    mixed_N ^= mixed_N >> np.uint64(31)
    kept_N: npt.NDArray[np.bool_] = mixed_N.astype(np.float64) < sample * 2.0**64
    return kept_N
