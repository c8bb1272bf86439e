"""Trees that find their own size: experts are split, and taken off, as rows that were held out tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from moesaic.classic.data import Data
from moesaic.classic.em import EM
from moesaic.classic.gate import along_paths, log_branches
from moesaic.classic.mixture import Mixture
from moesaic.classic.start import random_gates
from moesaic.classic.tree import Floats


@dataclass(kw_only=True)
class Gardener:
    """Changes a tree one expert at a time.

    Attributes:
        em: how a changed mixture is fitted.
        train: rows to fit to.
        held_out: rows whose likelihood decides.
        random: where splits are drawn from.
        passes: of EM after each change.
        tries: experts that are tried for a split, worst first; and directions for each.
        history: number of experts and held-out log-likelihood of a row, of each mixture that was kept.
    """

    em: EM
    train: Data
    held_out: Data
    random: np.random.RandomState
    passes: int = 10
    tries: tuple[int, int] = (3, 2)
    history: list[tuple[int, float]] = field(default_factory=list)

    def grown(self, mixture: Mixture, max_experts: int) -> Mixture:
        """Split the expert whose halves explain held-out rows best, for as long as they clearly gain by it.

        Clearly is by more than one standard error: the best of several tries gains a little by luck alone.
        """
        self._noted(mixture)
        while mixture.tree.num_experts < max_experts:
            found = self._best_of(self._splits(mixture))
            if found is None or not self._is_clear(mixture, found[0]):
                break
            mixture, best = found
            self.history.append((mixture.tree.num_experts, best))
        return mixture

    def pruned(self, mixture: Mixture) -> Mixture:
        """Take off the expert that held-out rows miss least, for as long as they do without it as well as with it."""
        best = self._noted(mixture)
        while mixture.tree.num_experts > 1:
            found = self._best_of(self._cuts(mixture))
            if found is None or found[1] < best:
                break
            mixture, best = found
            self.history.append((mixture.tree.num_experts, best))
        return mixture

    def _noted(self, mixture: Mixture) -> float:
        value = self._held_out(mixture)
        self.history.append((mixture.tree.num_experts, value))
        return value

    def _held_out(self, mixture: Mixture) -> float:
        loglik_T = mixture.posterior(self.held_out.x_TD, self.held_out.y_TO)[1]
        return float(self.held_out.weight_T @ loglik_T) / self.held_out.total

    def _is_clear(self, before: Mixture, after: Mixture) -> bool:
        """Whether held-out rows gain more than one standard error of what each of them gains."""
        rows, share_T = self.held_out, self.held_out.weight_T / self.held_out.total
        gain_T = after.posterior(rows.x_TD, rows.y_TO)[1] - before.posterior(rows.x_TD, rows.y_TO)[1]
        gain = float(share_T @ gain_T)
        return gain > float(np.sqrt(share_T**2 @ (gain_T - gain) ** 2))

    def _best_of(self, candidates: Iterator[Mixture]) -> tuple[Mixture, float] | None:
        fitted = [self._fitted(one) for one in candidates]
        return max(((one, self._held_out(one)) for one in fitted), key=lambda pair: pair[1], default=None)

    def _fitted(self, mixture: Mixture) -> Mixture:
        *_, (mixture, _) = islice(self.em.passes(mixture, self.train), self.passes + 1)
        return mixture

    def _cuts(self, mixture: Mixture) -> Iterator[Mixture]:
        for expert in range(mixture.tree.num_experts):
            yield mixture.grafted(mixture.tree.without(expert))

    def _splits(self, mixture: Mixture) -> Iterator[Mixture]:
        posterior_TE, loglik_T = mixture.posterior(self.train.x_TD, self.train.y_TO)
        # Where likelihood is missing most: an expert's rows, times how far each is below the best.
        missing_E = (self.train.weight_T * (loglik_T.max() - loglik_T)) @ posterior_TE
        num_experts, num_directions = self.tries
        for expert in np.argsort(-missing_E)[:num_experts]:
            for _ in range(num_directions):
                yield self._split(mixture, int(expert), posterior_TE)

    def _split(self, mixture: Mixture, expert: int, posterior_TE: Floats) -> Mixture:
        """Two copies of an expert, each fitted to its side of a plane through the middle of that expert's rows."""
        graft = mixture.tree.split(expert)
        whole = mixture.grafted(graft)
        theirs = replace(self.train, weight_T=self.train.weight_T * posterior_TE[:, expert])
        new_A = graft.branch_A < 0
        planes_AD = random_gates(graft.tree, theirs, self.random, 2.0)
        gate_AD = np.where(new_A[:, None], planes_AD, whole.gate_AD)
        log_branch_TA = log_branches(graft.tree, gate_AD, self.train.x_TD)
        side_TE = np.exp(along_paths(graft.tree, log_branch_TA * new_A))
        shared_TE = posterior_TE[:, graft.expert_E] * side_TE
        return replace(self.em.maximized(whole, self.train, shared_TE), gate_AD=gate_AD)
