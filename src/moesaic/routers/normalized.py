"""Logits brought to one mean and one spread before the softmax, so that gates stay sharp (Skywork-MoE)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing
from moesaic.routers.token_choice import TokenChoiceRouter, check_top_k


class NormalizedRouter(TokenChoiceRouter):
    """Keep the K best experts of ``softmax(scale * (z - mean) / std)``, where mean and std are over a token's experts.

    The gate does not see how large the logits are, only how they lie to each other. Weights add up to 1.

    Args:
        width: D.
        num_experts: E.
        top_k: K.
        scale: standard deviation of the normalised logits, lambda in the paper: larger is sharper.
        eps: added to the variance, so that equal logits stay equal.
        logit_bias: see :class:`~moesaic.routers.LinearRouter`.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th choice, best first.
        ``logits_TE`` are the logits before normalisation, ``scores_TE`` the softmax after it.
    Raises:
        ConfigError: if ``top_k`` is not in ``2..num_experts``, there are fewer than 3 experts, or ``scale`` or ``eps``
            is not positive.

    Source: Skywork-MoE, section 4.1. The standard deviation is that of the population (divided by E).
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int,
        scale: float = 1.0,
        eps: float = 1e-6,
        logit_bias: bool = True,
        init: Init | None = None,
    ) -> None:
        check_top_k(top_k, num_experts)
        if top_k == 1:
            raise ConfigError(
                "top_k must be at least 2, got 1: the one weight would be 1 and cut the router's gradient. "
                "Use top_k=2, or TopKRouter(normalize='scores')."
            )
        if num_experts < 3:
            raise ConfigError(
                f"num_experts must be at least 3, got {num_experts}: the normalised logits of two are always the same "
                "two numbers. Add experts, or use TopKRouter."
            )
        for name, value, usual in (("scale", scale, 1.0), ("eps", eps, 1e-6)):
            if value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}. Leave it at {usual} if unsure.")
        super().__init__(width, num_experts, top_k=top_k, logit_bias=logit_bias, init=init)
        self.scale = scale
        self.eps = eps

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        normalized_TE = self.scale * normalized(logits_TE, self.eps)
        scores_TE = normalized_TE.softmax(dim=-1)
        # The logits order experts as their normalised form does, and stay apart where that rounds them together.
        expert_TK = self.chosen(logits_TE, scores_TE, context)
        weight_TK = normalized_TE.gather(1, expert_TK).softmax(dim=-1)
        return Routing.from_choices(expert_TK, weight_TK, logits_TE, scores_TE, valid_T)


def normalized(logits_TE: Tensor, eps: float) -> Tensor:
    """Each token's logits less their mean, over their standard deviation; minus infinity stays out of both."""
    out_TE = logits_TE == float("-inf")
    count_T1 = (~out_TE).sum(dim=-1, keepdim=True).clamp_min(1)
    mean_T1 = logits_TE.masked_fill(out_TE, 0).sum(dim=-1, keepdim=True) / count_T1
    apart_TE = (logits_TE - mean_T1).masked_fill(out_TE, 0)
    variance_T1 = apart_TE.square().sum(dim=-1, keepdim=True) / count_T1
    return (apart_TE * torch.rsqrt(variance_T1 + eps)).masked_fill(out_TE, float("-inf"))
