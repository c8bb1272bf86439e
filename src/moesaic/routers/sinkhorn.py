"""Sinkhorn routing: in training, experts are chosen from a transport plan that shares the tokens out evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.init import Init
from moesaic.core.routing import Routing, checked_mask
from moesaic.routers.linear import LinearRouter
from moesaic.routers.select import select_top_k
from moesaic.routers.token_choice import check_top_k

EPSILON = 1e-8  # keeps an expert that nobody wants from a division by 0


class SinkhornRouter(LinearRouter):
    """Choose by the entropy-regularised balanced plan in training, by the logits themselves in evaluation.

    The plan carries no gradient. A token's weights are its own scores, whatever the plan holds: ``sigmoid(logits)`` for
    one choice and ``softmax(logits)`` over all experts for more. Padding takes no part in the plan.

    Args:
        width: D.
        num_experts: E.
        top_k: K.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th choice, best first.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``.

    Source: Clark et al. 2022, "Unified Scaling Laws for Routed Language Models" (S-BASE); weights as in Megatron-LM.
    """

    def __init__(self, width: int, num_experts: int, *, top_k: int = 1, init: Init | None = None) -> None:
        check_top_k(top_k, num_experts)
        super().__init__(width, num_experts, init=init)
        self.top_k = top_k

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.sigmoid() if self.top_k == 1 else logits_TE.softmax(dim=-1)
        expert_TK = select_top_k(logits_TE.detach(), self.top_k)
        if self.training:
            valid_T = checked_mask(valid_T, x_TD.shape[0], x_TD.device)
            expert_TK[valid_T] = select_top_k(sinkhorn_plan(logits_TE[valid_T]), self.top_k)
        return Routing.from_choices(expert_TK, scores_TE.gather(1, expert_TK), logits_TE, scores_TE, valid_T)


@torch.no_grad()
def sinkhorn_plan(logits_TE: Tensor, *, tolerance: float = 1e-4, max_steps: int = 1000) -> Tensor:
    """The plan ``diag(u) exp(logits) diag(v)`` whose rows add up to 1/T and columns to 1/E, float64.

    Megatron-LM's iteration, which stops once v moves by less than ``tolerance`` on average. Two changes: each row's
    largest logit is subtracted first, which leaves the plan as it is and cannot overflow; and it stops after
    ``max_steps``, where Megatron's float32 can go round for ever (v reaches 1e8 / E for an expert that nobody wants).

    Shape:
        ``(T, E)`` -> ``(T, E)``.
    """
    num_tokens, num_experts = logits_TE.shape
    kernel_TE = (logits_TE - logits_TE.amax(dim=-1, keepdim=True)).double().exp()
    row_T = kernel_TE.new_ones(num_tokens)
    column_E = kernel_TE.new_ones(num_experts)
    for _ in range(max_steps if num_tokens else 0):
        before_E = column_E
        row_T = 1 / num_tokens / (kernel_TE @ column_E + EPSILON)
        column_E = 1 / num_experts / (row_T @ kernel_TE + EPSILON)
        if (column_E - before_E).abs().mean() <= tolerance:
            break
    return row_T[:, None] * kernel_TE * column_E
