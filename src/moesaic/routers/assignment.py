"""Balanced assignment: in training, tokens are dealt out so that every expert gets the same number (BASE layers)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing, checked_mask
from moesaic.routers.linear import LinearRouter
from moesaic.routers.select import select_top_k


class BalancedAssignmentRouter(LinearRouter):
    """One expert per token: the best balanced assignment in training, simply the best expert in evaluation.

    Training solves ``max_A sum_t logits[t, A_t]`` so that the experts' loads differ by one at most (not at all where E
    divides T), exactly and without a gradient. What trains the router is the weight, ``sigmoid(logits[t, A_t])``.
    Padding is assigned to nobody; its rows name the best expert and are not kept.

    The solver's time grows as the cube of the tokens: 1,024 take 0.05 s, 4,096 take 5 s. Longer batches are therefore
    solved in parts, as BASE's workers each solve for their own tokens. Parts hold every n-th token, since neighbours
    are alike (BASE shuffles them), and all parts but the last a multiple of E, so that loads add up evenly.

    Args:
        width: D.
        num_experts: E.
        assign_tokens: most tokens assigned in one go.
        init: draws the initial weights, BASE's expert centroids.
    Shape:
        ``(T, D)`` -> Routing of T rows; row ``t`` is token ``t``'s expert.
    Raises:
        ConfigError: if ``assign_tokens`` is below 1.

    Source: Lewis et al. 2021, "BASE Layers", section 3, and their code (fairseq).
    """

    def __init__(self, width: int, num_experts: int, *, assign_tokens: int = 1024, init: Init | None = None) -> None:
        if assign_tokens < 1:
            raise ConfigError(f"assign_tokens must be at least 1, got {assign_tokens}. 1024 are solved in 0.05 s.")
        super().__init__(width, num_experts, init=init)
        self.assign_tokens = assign_tokens

    @property
    def experts_per_token(self) -> float:
        """1."""
        return 1.0

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.sigmoid()
        expert_TK = select_top_k(logits_TE.detach(), 1)
        if self.training:
            valid_T = checked_mask(valid_T, x_TD.shape[0], x_TD.device)
            expert_TK[valid_T, 0] = self._assign(logits_TE.detach()[valid_T])
        return Routing.from_choices(expert_TK, scores_TE.gather(1, expert_TK), logits_TE, scores_TE, valid_T)

    def _assign(self, score_TE: Tensor) -> Tensor:
        num_tokens, num_experts = score_TE.shape
        expert_T = torch.zeros(num_tokens, dtype=torch.int64, device=score_TE.device)
        if num_tokens == 0:
            return expert_T
        num_parts = math.ceil(num_tokens / (max(1, self.assign_tokens // num_experts) * num_experts))
        size = math.ceil(num_tokens / num_parts / num_experts) * num_experts
        every_nth_T = torch.cat([torch.arange(part, num_tokens, num_parts) for part in range(num_parts)])
        for start in range(0, num_tokens, size):
            token_M = every_nth_T[start : start + size].to(score_TE.device)
            expert_T[token_M] = balanced_assignment(score_TE[token_M])
        return expert_T


def balanced_assignment(score_TE: Tensor) -> Tensor:
    """The expert of each token, so that loads differ by one at most and the sum of the chosen scores is greatest.

    Scores that are not finite count as the least finite one, as in BASE's code.

    Shape:
        ``(T, E)`` -> ``(T,)``, int64.
    """
    # Late: scipy takes 0.3 s to import, and only this design needs it.
    from scipy.optimize import linear_sum_assignment

    num_tokens, num_experts = score_TE.shape
    score = score_TE.detach().double().cpu().numpy()
    finite = np.isfinite(score)
    score = np.where(finite, score, score[finite].min() if finite.any() else 0.0)
    # One column for each place: every expert has as many as all are sure to get, and one more if some get one more.
    sure = num_tokens // num_experts
    places = -(-num_tokens // num_experts)
    value = np.repeat(score, places, axis=1)
    # Nobody sits in the places left over, and those are all among the experts' last ones.
    nobody = np.where(np.arange(num_experts * places) % places < sure, -np.inf, 0.0)
    value = np.vstack([value, np.tile(nobody, (num_experts * places - num_tokens, 1))])
    _, place = linear_sum_assignment(value, maximize=True)
    return torch.from_numpy(place[:num_tokens] // places).to(score_TE.device)
