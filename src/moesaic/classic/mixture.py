"""The model of 1991 and of 1994 as one value: a tree of gates over experts, and how targets scatter around them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesaic.classic.cores import gathered
from moesaic.classic.expert import Experts
from moesaic.classic.family import Family
from moesaic.classic.gate import along_paths, log_branches
from moesaic.classic.tree import Floats, Graft, Tree


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """``P(y | x) = Σ_e g_e(x) P_e(y | x)``.

    Attributes:
        tree: of gates.
        gate_AD: logits of the branches are ``x · gate``.
        experts: what each says about a row.
        family: of each expert's target.
        dispersion_EO: the Gaussian's variance, 1 for others.
        is_blended: whether experts only answer together, as those trained by the cooperative error do: the target then
            scatters around the blend of their means, with the first expert's dispersion.
    """

    tree: Tree
    gate_AD: Floats
    experts: Experts
    family: Family
    dispersion_EO: Floats
    is_blended: bool = False

    def log_gate(self, x_TD: Floats) -> Floats:
        """Log-probability of each expert by the input alone (T, E)."""
        return along_paths(self.tree, log_branches(self.tree, self.gate_AD, x_TD))

    def means(self, x_TD: Floats) -> Floats:
        """The target that each expert expects (T, E, O)."""
        return self.family.mean(self.experts.eta(x_TD))

    def mean(self, x_TD: Floats) -> Floats:
        """The target that all of them expect, each as far as its gate lets it (T, O)."""
        mean: Floats = np.einsum("te,teo->to", np.exp(self.log_gate(x_TD)), self.means(x_TD))
        return mean

    def joint(self, x_TD: Floats, y_TO: Floats) -> Floats:
        """Log-probability of expert and target together (T, E): ``log g_e + log P_e(y)``."""
        log_gate_TE = self.log_gate(x_TD)
        if self.is_blended:
            blend_T1O = np.einsum("te,teo->to", np.exp(log_gate_TE), self.means(x_TD))[:, None]
            return log_gate_TE + self.family.loglik(y_TO, self.family.link(blend_T1O), self.dispersion_EO[:1])
        return log_gate_TE + self.family.loglik(y_TO, self.experts.eta(x_TD), self.dispersion_EO)

    def posterior(self, x_TD: Floats, y_TO: Floats) -> tuple[Floats, Floats]:
        """Who it was (T, E), now that the target is known, and the target's log-density (T,): the E-step."""
        if self.experts.wants_all_rows:
            return normalized(self.joint(x_TD, y_TO))

        def part(rows: slice) -> tuple[Floats, Floats]:
            return normalized(self.joint(x_TD[rows], y_TO[rows]))

        posterior_TE, loglik_T = gathered(len(x_TD), 4 * self.dispersion_EO.size, part)
        return posterior_TE, loglik_T

    def components(self, x_TD: Floats) -> tuple[Floats, Floats, Floats]:
        """Log-weights (T, E), means (T, E, O) and dispersions (E, O) of the distribution of a target."""
        if self.is_blended:
            return np.zeros((len(x_TD), 1)), self.mean(x_TD)[:, None], self.dispersion_EO[:1]
        return self.log_gate(x_TD), self.means(x_TD), self.dispersion_EO

    def squared_slopes(self) -> float:
        """What a penalty is on: the sum of squares of all numbers but the constants' weights."""
        return float((self.gate_AD[:, :-1] ** 2).sum()) + self.experts.squared_slopes()

    def grafted(self, graft: Graft) -> Mixture:
        """The same on a changed tree; new gates do not decide anything yet."""
        gate_AD = np.zeros((len(graft.branch_A), self.gate_AD.shape[1]))
        is_old = graft.branch_A >= 0
        gate_AD[is_old] = self.gate_AD[graft.branch_A[is_old]]
        return replace(
            self,
            tree=graft.tree,
            gate_AD=gate_AD,
            experts=self.experts.take(graft.expert_E),
            dispersion_EO=self.dispersion_EO[graft.expert_E],
        )


def normalized(joint_TE: Floats) -> tuple[Floats, Floats]:
    """Rows of log-probabilities to probabilities that sum to 1, and the logarithm of what they summed to."""
    largest_T1 = joint_TE.max(axis=1, keepdims=True)
    share_TE = np.exp(joint_TE - largest_T1)
    total_T1 = share_TE.sum(axis=1, keepdims=True)
    share_TE /= total_T1
    return share_TE, (largest_T1 + np.log(total_T1))[:, 0]
