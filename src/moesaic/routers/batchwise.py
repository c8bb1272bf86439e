"""Strictly balanced gates: in training every expert keeps as many tokens as every other (Shazeer 2017, appendix F)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.init import Init
from moesaic.core.routing import Routing, checked_mask
from moesaic.routers.linear import LinearRouter
from moesaic.routers.select import select_top_k
from moesaic.routers.token_choice import check_top_k


class BatchwiseRouter(LinearRouter):
    """In training each expert keeps its best ``m = K T / E`` tokens; in evaluation, the tokens above its threshold.

    Expert choice, five years before the name: a token gets K experts on average in training, and none at all where
    nobody wanted it. A training step looks at the whole batch, and so at later tokens; evaluation does not.

    Args:
        width: D, the width of a token.
        num_experts: E.
        top_k: K, experts per token on average in training.
        init: draws the gate. Not 0: with all gates equal every expert keeps the same, earliest tokens.
    Shape:
        ``(T, D)`` -> Routing of about ``T * K`` rows. A token's weights are the gates of its experts, divided by their
        sum. ``scores_TE`` is the softmax over all experts. ``extras["threshold_E"]`` is the learned threshold for
        :func:`~moesaic.balance.threshold_loss`; it starts at ``1 / E``, the mean of the gates.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``.
    """

    def __init__(self, width: int, num_experts: int, *, top_k: int, init: Init | None = None) -> None:
        check_top_k(top_k, num_experts)
        super().__init__(width, num_experts, init=init)
        self.top_k = top_k
        self.threshold_E = nn.Parameter(torch.full((num_experts,), 1 / num_experts))

    @property
    def experts_per_token(self) -> float:
        """K, on average."""
        return float(self.top_k)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        threshold_E = self.threshold_E.to(scores_TE.dtype)
        if self.training:
            chosen_TE = self._best_of_batch(logits_TE.detach(), checked_mask(valid_T, x_TD.shape[0], x_TD.device))
        else:
            chosen_TE = scores_TE > threshold_E
        # A softmax over the chosen. No line may be minus infinity all along, which has no softmax: tokens that nobody
        # chose keep their logits, and a gate of 0 that an expert had to take counts as the smallest number.
        others_TE = ~chosen_TE & chosen_TE.any(dim=-1, keepdim=True)
        finite_TE = logits_TE.clamp_min(torch.finfo(logits_TE.dtype).min)
        weight_TE = finite_TE.masked_fill(others_TE, float("-inf")).softmax(dim=-1)
        return Routing.from_mask(
            chosen_TE, weight_TE, logits_TE, scores_TE, valid_T, extras={"threshold_E": threshold_E}
        )

    def _best_of_batch(self, logits_TE: Tensor, valid_T: Tensor) -> Tensor:
        """True on each expert's ``m`` best valid tokens; the earliest of equals."""
        valid = valid_T.nonzero().squeeze(1)
        num_kept = min(max(self.top_k * len(valid) // self.num_experts, 1), len(valid))
        # Logarithms of the gates order tokens as gates do, and stay apart where gates have underflowed.
        gate_ET = logits_TE[valid].log_softmax(dim=-1).t()
        best = valid[select_top_k(gate_ET, num_kept)]
        return torch.zeros_like(logits_TE, dtype=torch.bool).t().scatter(1, best, True).t()
