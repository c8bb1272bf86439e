"""Expectation-maximisation: who explains each row (E-step), then everybody fitted to what is theirs (M-step)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moesaic.classic.data import Data
from moesaic.classic.gate import FitGates, by_newton, posterior_branches
from moesaic.classic.mixture import Mixture
from moesaic.classic.noise import Noise
from moesaic.classic.tree import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class EM:
    """How a mixture is fitted.

    Attributes:
        noise: how the variance is estimated.
        penalty: on half the squared slopes of experts and gates, as if each were drawn from a Gaussian of variance
            1 / penalty.
        gates: the M-step of the gates; :func:`~moesaic.classic.gate.by_newton` never lowers the likelihood.
    """

    noise: Noise
    penalty: float = 0.0
    gates: FitGates = by_newton

    def passes(self, mixture: Mixture, data: Data) -> Iterator[tuple[Mixture, float]]:
        """The mixture before the first pass, after it, after the second …, each with its :meth:`objective`."""
        while True:
            posterior_TE, loglik_T = mixture.posterior(data.x_TD, data.y_TO)
            yield mixture, self._less_penalty(mixture, data, loglik_T)
            mixture = self.maximized(mixture, data, posterior_TE)

    def maximized(self, mixture: Mixture, data: Data, posterior_TE: Floats) -> Mixture:
        """The M-step."""
        share_TE = data.weight_T[:, None] * posterior_TE
        share_TA = posterior_branches(mixture.tree, share_TE)
        experts = mixture.experts.fitted(data, share_TE, mixture.family, mixture.dispersion_EO, self.penalty)
        mixture = replace(mixture, experts=experts)
        return replace(
            mixture,
            gate_AD=self.gates(mixture.tree, mixture.gate_AD, data, share_TA, self.penalty),
            dispersion_EO=self.noise.estimate(mixture.dispersion_EO, data.y_TO, mixture.means(data.x_TD), share_TE),
        )

    def objective(self, mixture: Mixture, data: Data) -> float:
        """What the passes climb: log-likelihood of a row, on average, less the penalty's part of it."""
        return self._less_penalty(mixture, data, mixture.posterior(data.x_TD, data.y_TO)[1])

    def _less_penalty(self, mixture: Mixture, data: Data, loglik_T: Floats) -> float:
        return (float(data.weight_T @ loglik_T) - 0.5 * self.penalty * mixture.squared_slopes()) / data.total
