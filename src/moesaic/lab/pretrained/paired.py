"""How sure a difference is: two models on the same questions, two models on the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error.

    Attributes:
        mean: the estimate.
        error: its standard error; NaN where one value alone tells nothing of it.
    """

    mean: float
    error: float

    @property
    def is_sure(self) -> bool:
        """Whether it is more than two standard errors from 0."""
        return abs(self.mean) > 2 * self.error


def share(values: Sequence[bool]) -> Estimate:
    """How often something was true."""
    mean = sum(values) / len(values)
    return Estimate(mean, math.sqrt(mean * (1 - mean) / len(values)))


def paired_share(these: Sequence[bool], those: Sequence[bool]) -> Estimate:
    """By how much one share is above another of the same questions; only questions answered differently add error."""
    differences = [float(this) - float(that) for this, that in zip(these, those, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / max(1, len(differences) - 1)
    return Estimate(mean, math.sqrt(variance / len(differences)))


def mcnemar(these: Sequence[bool], those: Sequence[bool]) -> float:
    """The exact two-sided p-value that the questions answered differently fall either way by chance.

    Source: McNemar 1947, in the exact (binomial) form.
    """
    gained = sum(this and not that for this, that in zip(these, those, strict=True))
    lost = sum(that and not this for this, that in zip(these, those, strict=True))
    differing = gained + lost
    tail = sum(math.comb(differing, count) for count in range(min(gained, lost) + 1))
    return min(1.0, tail / float(2 ** (differing - 1))) if differing else 1.0


def paired_ratio(differences: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """The sum of differences over the sum of sizes, for documents of unlike size.

    The error is that of a ratio of sums over independent documents, to first order (Cochran 1977, section 2.11).

    Args:
        differences: of each document, such as bits under one model less bits under another.
        sizes: of each document, such as bytes.
    """
    count, total = len(differences), sum(sizes)
    ratio = sum(differences) / total
    if count < 2:
        return Estimate(ratio, math.nan)
    squares = sum((value - ratio * size) ** 2 for value, size in zip(differences, sizes, strict=True))
    return Estimate(ratio, math.sqrt(squares * count / (count - 1)) / total)


def mean_of(parts: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates."""
    error = math.sqrt(sum(part.error**2 for part in parts)) / len(parts)
    return Estimate(sum(part.mean for part in parts) / len(parts), error)
