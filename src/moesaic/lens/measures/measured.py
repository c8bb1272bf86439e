"""What every measure is: a number, what chance would give in its place, and how many observations it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """One measure for each layer, or for each layer, domain and expert, beside what chance would give.

    Attributes:
        value: the measure; NaN where there is nothing to measure.
        chance: what a router without any opinion would show, same shape; NaN where chance says nothing.
        count: observations that each value rests on; broadcasts to ``value``.
        counted: what ``count`` counts, in words.
    """

    value: FloatArray
    chance: FloatArray
    count: IntArray
    counted: str

    @classmethod
    def of(cls, value: npt.NDArray[Any], chance: object, count: npt.NDArray[Any], counted: str) -> Measured:
        """Put the parts together; ``chance`` may be one number for all."""
        value = np.asarray(value, dtype=np.float64)
        # Where there is no value, chance has no number either.
        beside = np.where(np.isnan(value), np.nan, np.broadcast_to(np.asarray(chance, dtype=np.float64), value.shape))
        return cls(value=value, chance=beside, count=np.asarray(count, dtype=np.int64), counted=counted)

    @classmethod
    def stack(cls, measured: Sequence[Measured]) -> Measured:
        """Lay measures of one shape along a new first axis, such as one for each domain or for each training step."""
        return cls(
            value=np.stack([one.value for one in measured]),
            chance=np.stack([one.chance for one in measured]),
            count=np.stack([one.count for one in measured]),
            counted=measured[0].counted,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: nested lists, None for NaN."""
        return {
            "value": _listed(self.value),
            "chance": _listed(self.chance),
            "n": self.count.tolist(),
            "counted": self.counted,
        }


def divide(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> FloatArray:
    """``part / whole``, and NaN where there is no whole."""
    part, whole = np.broadcast_arrays(part, whole)
    ratio: FloatArray = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return ratio


def _listed(array: npt.NDArray[Any]) -> Any:
    plain = array.astype(object)
    plain[np.isnan(array)] = None
    return plain.tolist()
