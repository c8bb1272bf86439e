"""Where fitting begins. Gates that are all alike would stay so for ever: something has to make experts differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moesaic.classic.data import Data
from moesaic.classic.expert import Experts, LinearExperts, NetworkExperts, OwnExperts
from moesaic.classic.family import Family
from moesaic.classic.gate import along_paths, log_branches
from moesaic.classic.mixture import Mixture
from moesaic.classic.noise import Noise
from moesaic.classic.tree import Floats, Tree

SMALL = 0.01
"""Size of logits and slopes where everything starts nearly equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How a mixture begins.

    Attributes:
        kind: ``random`` cuts the inputs by soft random planes and fits each expert to its part; ``small`` is the start
            of 1991: gates that are all but equal, experts that are all but the same.
        tree: of gates.
        family: of the targets.
        noise: how the variance is estimated.
        variance_O: of the targets at first.
        hidden: units of network experts; None for linear ones.
        own: experts of the user's own, without their seeds; None for ours.
    """

    kind: Literal["random", "small"]
    tree: Tree
    family: Family
    noise: Noise
    variance_O: Floats
    hidden: int | None = None
    own: OwnExperts | None = None

    def __call__(self, data: Data, random: np.random.RandomState, penalty: float) -> Mixture:
        """Draw one."""
        count = self.tree.num_experts
        dispersion_EO = np.tile(self.variance_O, (count, 1))
        gate_AD = random_gates(self.tree, data, random, 1.0 if self.kind == "random" else SMALL)
        experts = self._experts(data, random)
        mixture = Mixture(
            tree=self.tree, gate_AD=gate_AD, experts=experts, family=self.family, dispersion_EO=dispersion_EO
        )
        if self.kind == "small" and self.own is None:
            return mixture
        share_TE = data.weight_T[:, None] * np.exp(along_paths(self.tree, log_branches(self.tree, gate_AD, data.x_TD)))
        mixture = replace(mixture, experts=experts.fitted(data, share_TE, self.family, dispersion_EO, penalty))
        means_TEO = mixture.means(data.x_TD)
        return replace(mixture, dispersion_EO=self.noise.estimate(dispersion_EO, data.y_TO, means_TEO, share_TE))

    def _experts(self, data: Data, random: np.random.RandomState) -> Experts:
        count, width = self.tree.num_experts, data.x_TD.shape[1]
        num_outputs = data.y_TO.shape[1]
        middle_O = self.family.link((data.weight_T @ data.y_TO / data.total)[None])[0]
        if self.own is not None:
            seeds = random.randint(np.iinfo(np.int32).max, size=count)
            return replace(self.own, seeds=tuple(int(seed) for seed in seeds))
        if self.hidden is None:
            coef_EOD = SMALL * random.normal(size=(count, num_outputs, width))
            coef_EOD[..., -1] += middle_O
            return LinearExperts(coef_EOD)
        hidden_EFD = random.normal(size=(count, self.hidden, width)) / np.sqrt(width)
        output_EOF = random.normal(size=(count, num_outputs, self.hidden + 1)) / np.sqrt(self.hidden + 1)
        output_EOF[..., -1] = middle_O
        return NetworkExperts(hidden_EFD, output_EOF)


def random_gates(tree: Tree, data: Data, random: np.random.RandomState, size: float) -> Floats:
    """Random planes through the middle of the data; logits have a standard deviation of about ``size`` over it."""
    x_TD = data.x_TD[:, :-1]
    mean_D = data.weight_T @ x_TD / data.total
    spread_D = np.sqrt(data.weight_T @ (x_TD - mean_D) ** 2 / data.total)
    slope_AD = random.normal(size=(tree.num_branches, len(mean_D))) * size / np.sqrt(max(1, len(mean_D)))
    slope_AD = slope_AD / np.where(spread_D > 0, spread_D, 1.0)
    return np.concatenate([slope_AD, -(slope_AD @ mean_D)[:, None]], axis=1)
