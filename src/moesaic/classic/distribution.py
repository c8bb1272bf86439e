"""The distribution of targets that a mixture predicts: not only their mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from moesaic.classic.family import Family
from moesaic.classic.tree import Floats
from moesaic.core.errors import ConfigError, ShapeError

_HALVINGS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """For each row a mixture of E distributions, in the user's units.

    Figures of a target have the shape that targets had when the estimator was fitted: ``(T,)`` or ``(T, O)``.

    Attributes:
        log_weight_TE: logarithm of the weight of each expert, its gate.
        mean_TEO: what each expert expects.
        dispersion_EO: the variance of each Gaussian; 1 for a Poisson.
        family: of each expert's target.
        is_flat: whether targets are single numbers.
    """

    log_weight_TE: Floats
    mean_TEO: Floats
    dispersion_EO: Floats
    family: Family
    is_flat: bool

    @property
    def weights(self) -> Floats:
        """Weight of each expert (T, E)."""
        weights: Floats = np.exp(self.log_weight_TE)
        return weights

    @property
    def mean(self) -> Floats:
        """The expected target."""
        return self._shaped(self._over_experts(self.mean_TEO))

    @property
    def variance(self) -> Floats:
        """The variance of a target: what experts scatter, and how far they disagree."""
        mean_T1O = self._over_experts(self.mean_TEO)[:, None]
        inside = self.family.variance(self.mean_TEO, self.dispersion_EO)
        return self._shaped(self._over_experts(inside + (self.mean_TEO - mean_T1O) ** 2))

    @property
    def std(self) -> Floats:
        """The square root of the variance."""
        std: Floats = np.sqrt(self.variance)
        return std

    def logpdf(self, y: ArrayLike) -> Floats:
        """Log-density of a target for each row (T,), of all its numbers together; of a count, its log-probability."""
        y_TO = self._targets(y)
        each_TE = self.family.loglik(y_TO, self.family.link(self.mean_TEO), self.dispersion_EO)
        density: Floats = logsumexp(self.log_weight_TE + each_TE, axis=1)
        return density

    def pdf(self, y: ArrayLike) -> Floats:
        """Density of a target for each row (T,); of a count, its probability."""
        density: Floats = np.exp(self.logpdf(y))
        return density

    def cdf(self, y: ArrayLike) -> Floats:
        """The probability that a target is no more than this, for each of its numbers alone."""
        return self._shaped(self._cdf(self._targets(y)))

    def quantile(self, q: ArrayLike) -> Floats:
        """What a target stays below with probability ``q``, for each of its numbers alone; of a count, or equals.

        Args:
            q: one probability, or several, which then count the first dimension.
        Raises:
            ConfigError: if a probability is not between 0 and 1.
        """
        shares = np.atleast_1d(np.asarray(q, dtype=np.float64))
        if not ((shares > 0) & (shares < 1)).all():
            raise ConfigError(f"A quantile needs probabilities between 0 and 1, without the ends; got {q!r}.")
        found = np.stack([self._shaped(self._quantile(float(share))) for share in shares])
        return found if np.ndim(q) else found[0]

    def interval(self, level: float = 0.9) -> tuple[Floats, Floats]:
        """The two quantiles that leave out the same share below and above."""
        low, high = self.quantile([(1 - level) / 2, (1 + level) / 2])
        return low, high

    def _over_experts(self, values_TEO: Floats) -> Floats:
        total: Floats = np.einsum("te,teo->to", self.weights, values_TEO)
        return total

    def _cdf(self, y_TO: Floats) -> Floats:
        return self._over_experts(self.family.cdf(y_TO[:, None], self.mean_TEO, self.dispersion_EO))

    def _quantile(self, share: float) -> Floats:
        """Between the least and the greatest quantile that an expert could have, halved until nothing is left."""
        std = np.sqrt(self.family.variance(self.mean_TEO, self.dispersion_EO))
        # Chebyshev: no distribution has more than ``share`` of itself further below its mean.
        low_TO: Floats = (self.mean_TEO - std * np.sqrt(1 / share)).min(axis=1)
        high_TO: Floats = (self.mean_TEO + std * np.sqrt(1 / (1 - share))).max(axis=1)
        if self.family.is_discrete:
            low_TO, high_TO = np.floor(low_TO) - 1, np.ceil(high_TO) + 1
        for _ in range(_HALVINGS):
            middle_TO = (low_TO + high_TO) / 2
            if self.family.is_discrete:
                middle_TO = np.floor(middle_TO)
            is_above_TO = self._cdf(middle_TO) >= share
            high_TO = np.where(is_above_TO, middle_TO, high_TO)
            low_TO = np.where(is_above_TO, low_TO, middle_TO)
        return high_TO

    def _targets(self, y: ArrayLike) -> Floats:
        y_TO = np.asarray(y, dtype=np.float64)
        num_rows, _, num_outputs = self.mean_TEO.shape
        if self.is_flat and y_TO.ndim <= 1:
            y_TO = np.broadcast_to(y_TO, (num_rows,))[:, None] if y_TO.shape in {(), (num_rows,)} else y_TO
        if y_TO.shape != (num_rows, num_outputs):
            needed = f"({num_rows},)" if self.is_flat else f"({num_rows}, {num_outputs})"
            raise ShapeError(f"A target for each row was needed, of shape {needed}; got {np.shape(y)}.")
        return y_TO

    def _shaped(self, values_TO: Floats) -> Floats:
        return values_TO[:, 0] if self.is_flat else values_TO
