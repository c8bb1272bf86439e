"""What is fitted: inputs with a constant, targets and weights of the rows, in the units that the maths works in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesaic.classic.tree import Floats


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows to fit.

    Attributes:
        x_TD: inputs, the last of which is the constant 1.
        y_TO: targets; classes as rows with a single 1, or one output of 0 and 1.
        weight_T: weight of each row.
    """

    x_TD: Floats
    y_TO: Floats
    weight_T: Floats

    @cached_property
    def scale_D(self) -> Floats:
        """Each input's sum of squares."""
        scale: Floats = self.weight_T @ self.x_TD**2
        return scale

    @cached_property
    def total(self) -> float:
        """The sum of the weights."""
        return float(self.weight_T.sum())

    def rows(self, chosen: object) -> Data:
        """Some of them."""
        at: np.ndarray = np.asarray(chosen)
        return Data(x_TD=self.x_TD[at], y_TO=self.y_TO[at], weight_T=self.weight_T[at])


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Between the user's units and those that the maths works in, which have mean 0 and variance 1.

    Attributes:
        shift_D, scale_D: of the inputs, without the constant.
        y_shift_O, y_scale_O: of the targets.
    """

    shift_D: Floats
    scale_D: Floats
    y_shift_O: Floats
    y_scale_O: Floats

    @classmethod
    def of(
        cls, X: Floats, y_TO: Floats, weight_T: Floats, *, moves_inputs: bool = True, moves_targets: bool = True
    ) -> Frame:
        """The frame in which weighted data have mean 0 and variance 1; a constant stays as it is."""
        shift_D, scale_D = _moments(X, weight_T) if moves_inputs else _as_they_are(X)
        y_shift_O, y_scale_O = _moments(y_TO, weight_T) if moves_targets else _as_they_are(y_TO)
        return cls(shift_D=shift_D, scale_D=scale_D, y_shift_O=y_shift_O, y_scale_O=y_scale_O)

    def inputs(self, X: Floats) -> Floats:
        """Inputs in the frame, with the constant behind them."""
        return np.concatenate([(X - self.shift_D) / self.scale_D, np.ones((len(X), 1))], axis=1)

    def targets(self, y_TO: Floats) -> Floats:
        """Targets in the frame."""
        return (y_TO - self.y_shift_O) / self.y_scale_O

    def targets_back(self, y_TO: Floats) -> Floats:
        """Targets in the user's units."""
        return y_TO * self.y_scale_O + self.y_shift_O

    def maps_back(self, coef_EOD: Floats, *, of_targets: bool) -> tuple[Floats, Floats]:
        """Slopes (E, O, D − 1) and intercepts (E, O) of linear maps in the user's units."""
        slope = coef_EOD[..., :-1] / self.scale_D
        intercept_EO = coef_EOD[..., -1] - slope @ self.shift_D
        if of_targets:
            slope = slope * self.y_scale_O[:, None]
            intercept_EO = intercept_EO * self.y_scale_O + self.y_shift_O
        return slope, intercept_EO


def _moments(values: Floats, weight_T: Floats) -> tuple[Floats, Floats]:
    total = weight_T.sum()
    mean: Floats = weight_T @ values / total
    deviation = np.sqrt(weight_T @ (values - mean) ** 2 / total)
    # What rounding leaves of a constant is no spread.
    is_spread = deviation > 1e-10 * np.maximum(np.abs(mean), np.finfo(float).tiny)
    return mean, np.where(is_spread, deviation, 1.0)


def _as_they_are(values: Floats) -> tuple[Floats, Floats]:
    return np.zeros(values.shape[1]), np.ones(values.shape[1])
