"""The on-line algorithm of 1994: every row moves gates and experts a little, by recursive least squares with decay."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from moesaic.classic.data import Data
from moesaic.classic.expert import LinearExperts
from moesaic.classic.gate import SMALLEST_POSTERIOR
from moesaic.classic.mixture import Mixture
from moesaic.classic.noise import Noise
from moesaic.classic.tree import Floats

EXPERT_TRUST, GATE_TRUST = 1.0, 10.0
"""How many rows the numbers at the start are worth, in each direction of the inputs."""
NOISE_TRUST = 10.0
DECAY_EVERY, DECAY_STEP = 1000, 0.6
"""After so many rows the decay goes so far towards 1, where nothing is forgotten any more."""


@dataclass(kw_only=True)
class Online:
    """A mixture of linear experts that learns row by row.

    Attributes:
        mixture: as it was at the start; :meth:`now` gives it as it is.
        noise: how the variance is estimated.
        decay: what every row leaves of the weight of those before it.
    Source:
        Jordan and Jacobs 1994, section 5, with the exact recursion of weighted least squares.
    """

    mixture: Mixture
    noise: Noise
    decay: float
    num_rows: int = 0
    gate_AD: Floats = field(init=False)
    coef_EOD: Floats = field(init=False)
    dispersion_EO: Floats = field(init=False)
    _gate_gain: Floats = field(init=False)
    _expert_gain: Floats = field(init=False)
    _squares_EO: Floats = field(init=False)
    _seen_E: Floats = field(init=False)

    def __post_init__(self) -> None:
        experts = self.mixture.experts
        assert isinstance(experts, LinearExperts)
        self.gate_AD, self.coef_EOD = self.mixture.gate_AD.copy(), experts.coef_EOD.copy()
        self.dispersion_EO = self.mixture.dispersion_EO.copy()
        num_experts, num_outputs, width = self.coef_EOD.shape
        # Outputs of a Gaussian share one matrix: their curvature is the same.
        kinds = 1 if self.mixture.family.is_gaussian else num_outputs
        self._expert_gain = np.tile(np.eye(width) / EXPERT_TRUST, (num_experts, kinds, 1, 1))
        self._gate_gain = np.tile(np.eye(width) / GATE_TRUST, (len(self.mixture.tree.start_G), 1, 1))
        self._squares_EO = NOISE_TRUST * self.dispersion_EO
        self._seen_E = np.full(num_experts, NOISE_TRUST)

    def now(self) -> Mixture:
        """The mixture, with what has been learned so far."""
        return replace(
            self.mixture,
            gate_AD=self.gate_AD.copy(),
            experts=LinearExperts(self.coef_EOD.copy()),
            dispersion_EO=self.dispersion_EO.copy(),
        )

    def learn(self, data: Data) -> float:
        """Take the rows in their order, and give the log-likelihood that each had before it was learned, on average."""
        total = 0.0
        for x_D, y_O, weight in zip(data.x_TD, data.y_TO, data.weight_T, strict=True):
            total += weight * self._row(x_D, y_O, weight)
        return total / data.total

    def _row(self, x_D: Floats, y_O: Floats, weight: float) -> float:
        tree, family = self.mixture.tree, self.mixture.family
        eta_EO = self.coef_EOD @ x_D
        mean_EO = family.mean(eta_EO[None])[0]
        log_branch_A = self._log_branches(x_D)
        joint_E = log_branch_A @ tree.path_AE + family.loglik(y_O[None], eta_EO[None], self.dispersion_EO)[0]
        largest = joint_E.max()
        posterior_E = np.exp(joint_E - largest)
        total = posterior_E.sum()
        posterior_E /= total
        self._move_gates(x_D, posterior_E, weight)
        self._move_experts(x_D, y_O - mean_EO, family.curvature(mean_EO), weight * posterior_E)
        self._move_noise(y_O - mean_EO, weight * posterior_E)
        self.num_rows += 1
        if self.num_rows % DECAY_EVERY == 0:
            self.decay += DECAY_STEP * (1 - self.decay)
        return float(largest + np.log(total))

    def _log_branches(self, x_D: Floats) -> Floats:
        tree = self.mixture.tree
        logits_A = self.gate_AD @ x_D
        if not tree.num_branches:
            return logits_A
        logits_A = logits_A - np.maximum.reduceat(logits_A, tree.start_G)[tree.group_A]
        lse: Floats = logits_A - np.log(np.add.reduceat(np.exp(logits_A), tree.start_G))[tree.group_A]
        return lse

    def _move_gates(self, x_D: Floats, posterior_E: Floats, weight: float) -> None:
        tree = self.mixture.tree
        if not tree.num_branches:
            return
        share_A = tree.path_AE @ posterior_E
        share_G = np.add.reduceat(share_A, tree.start_G)
        above_A = np.maximum(share_G, np.finfo(float).tiny)[tree.group_A]
        target_A = np.log(np.maximum(share_A / above_A, SMALLEST_POSTERIOR))
        step_GD = self._recursion(self._gate_gain, x_D, weight * share_G)
        wrong_A = weight * share_G[tree.group_A] * (target_A - self.gate_AD @ x_D)
        self.gate_AD += wrong_A[:, None] * step_GD[tree.group_A]

    def _move_experts(self, x_D: Floats, residual_EO: Floats, curvature_EO: Floats, share_E: Floats) -> None:
        kinds = self._expert_gain.shape[1]
        weight = share_E[:, None] * curvature_EO[:, :kinds]
        step = self._recursion(self._expert_gain, x_D, weight)
        self.coef_EOD += (share_E[:, None] * residual_EO)[..., None] * step

    def _move_noise(self, residual_EO: Floats, share_E: Floats) -> None:
        if not self.mixture.family.is_gaussian or self.noise.kind == "fixed":
            return
        self._squares_EO = self.decay * self._squares_EO + share_E[:, None] * residual_EO**2
        self._seen_E = self.decay * self._seen_E + share_E
        if self.noise.kind == "shared":
            each_EO = np.broadcast_to(self._squares_EO.sum(axis=0) / self._seen_E.sum(), self._squares_EO.shape)
        else:
            each_EO = self._squares_EO / np.maximum(self._seen_E, np.finfo(float).tiny)[:, None]
        self.dispersion_EO = np.maximum(each_EO, self.noise.floor_O)

    def _recursion(self, gain: Floats, x_D: Floats, weight: Floats) -> Floats:
        """Update the inverses of ``Σ w x xᵀ``, decayed, in place, and give each times x."""
        product = gain @ x_D
        below = self.decay + weight * (product @ x_D)
        step: Floats = product / below[..., None]
        gain -= (weight[..., None] * step)[..., None] * product[..., None, :]
        gain /= self.decay
        return step
