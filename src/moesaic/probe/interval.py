"""Means over texts of unequal length, and how sure they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.floating] | npt.NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean per unit over texts that hold different numbers of units, with its interval.

    Attributes:
        value: sum of what was measured over sum of units; NaN without units.
        low: end of the interval; NaN with fewer than two texts.
        high: the other end.
        p_value: of its being 0, two-sided; NaN with fewer than two texts.
        num_texts: texts with units.
    """

    value: float
    low: float
    high: float
    p_value: float
    num_texts: int

    def times(self, factor: float) -> Mean:
        """The same in another unit."""
        return Mean(
            value=self.value * factor,
            low=self.low * factor,
            high=self.high * factor,
            p_value=self.p_value,
            num_texts=self.num_texts,
        )


def mean_per_unit(sums: Numbers, units: Numbers, confidence: float = 0.95) -> Mean:
    """Sum over sum, with Student's t over texts on the linearised ratio.

    ``value = sum(s) / sum(u)``; with residuals ``r = s - value * u`` its variance is
    ``n / (n - 1) * sum(r^2) / sum(u)^2``: the estimator of a ratio from clusters (Cochran 1977, Sampling Techniques,
    section 6.4), with n - 1 degrees of freedom.

    Args:
        sums: of each text.
        units: of each text; texts with none are left out.
        confidence: of the interval.
    """
    from scipy import stats

    sums, units = np.asarray(sums, dtype=np.float64), np.asarray(units, dtype=np.float64)
    sums, units = sums[units > 0], units[units > 0]
    count, total = len(units), float(units.sum())
    if not count:
        return Mean(value=math.nan, low=math.nan, high=math.nan, p_value=math.nan, num_texts=0)
    value = float(sums.sum()) / total
    if count < 2:
        return Mean(value=value, low=math.nan, high=math.nan, p_value=math.nan, num_texts=count)
    residual = sums - value * units
    error = math.sqrt(count / (count - 1) * float(residual @ residual)) / total
    if error == 0:
        # Nothing has moved anywhere, or everything alike.
        return Mean(value=value, low=value, high=value, p_value=1.0 if value == 0 else 0.0, num_texts=count)
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * error
    p_value = 2 * float(stats.t.sf(abs(value) / error, count - 1))
    return Mean(value=value, low=value - half, high=value + half, p_value=p_value, num_texts=count)


def adjusted(p_values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Benjamini and Hochberg's adjusted p-values over all that are numbers; NaN stays.

    Calling those below 0.05 real keeps the expected share of false ones among them below 0.05, where the tests are
    independent or positively dependent (Benjamini and Hochberg 1995; Benjamini and Yekutieli 2001).
    """
    from scipy import stats

    result = np.full(p_values.shape, np.nan)
    known = ~np.isnan(p_values)
    if known.any():
        result[known] = stats.false_discovery_control(p_values[known], method="bh")
    return result
