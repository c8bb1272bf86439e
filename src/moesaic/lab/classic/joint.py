"""Regression by a mixture of Gaussians over inputs and target together, read as the target given the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class JointGaussians:
    """scikit-learn's ``GaussianMixture`` of (x, y), read as ``P(y | x)``: again a mixture of linear experts.

    Its gates are densities of the inputs, which it has to describe although nobody asks for them.

    Args:
        num_components: Gaussians.
        starts: fits, of which the best is kept.
        seed: of the starts.
    """

    def __init__(self, num_components: int, *, starts: int = 1, seed: int = 0):
        from sklearn.mixture import GaussianMixture

        self._joint = GaussianMixture(
            num_components, covariance_type="full", reg_covar=1e-4, n_init=starts, max_iter=300, random_state=seed
        )

    def fit(self, X: Floats, y_T: Floats) -> JointGaussians:
        """Describe inputs and target together."""
        rows = np.column_stack([X, y_T])
        self._mean, self._scale = rows.mean(axis=0), rows.std(axis=0)
        # Of a constant nothing is left to be told apart.
        self._scale[self._scale == 0] = 1.0
        self._joint.fit((rows - self._mean) / self._scale)
        return self

    def predict(self, X: Floats) -> Floats:
        """The expected target."""
        log_weight_TE, mean_TE, _ = self._given(X)
        expected_T = (np.exp(log_weight_TE) * mean_TE).sum(axis=1)
        return np.asarray(expected_T * self._scale[-1] + self._mean[-1], dtype=np.float64)

    def log_density(self, X: Floats, y_T: Floats) -> Floats:
        """Log-density of each row's target."""
        from scipy.special import logsumexp

        log_weight_TE, mean_TE, variance_E = self._given(X)
        away_TE = ((y_T - self._mean[-1]) / self._scale[-1])[:, None] - mean_TE
        log_TE = log_weight_TE - 0.5 * (away_TE**2 / variance_E + np.log(2 * np.pi * variance_E))
        log_T: Floats = logsumexp(log_TE, axis=1) - np.log(self._scale[-1])
        return log_T

    def _given(self, X: Floats) -> tuple[Floats, Floats, Floats]:
        """Given inputs, log-weight (T, E), mean (T, E) and variance (E,) of each component's target."""
        from scipy.special import logsumexp
        from scipy.stats import multivariate_normal

        x_TD = (X - self._mean[:-1]) / self._scale[:-1]
        log_TE, mean_TE, variance_E = [], [], []
        joint: Any = self._joint
        for share, middle, spread in zip(joint.weights_, joint.means_, joint.covariances_, strict=True):
            slope_D = np.linalg.solve(spread[:-1, :-1], spread[:-1, -1])
            log_TE.append(np.log(share) + multivariate_normal.logpdf(x_TD, middle[:-1], spread[:-1, :-1]))
            mean_TE.append(middle[-1] + (x_TD - middle[:-1]) @ slope_D)
            variance_E.append(spread[-1, -1] - spread[-1, :-1] @ slope_D)
        weight_TE = np.stack([np.atleast_1d(one) for one in log_TE], axis=1)
        weight_TE -= logsumexp(weight_TE, axis=1, keepdims=True)
        return weight_TE, np.stack(mean_TE, axis=1), np.array(variance_E)
