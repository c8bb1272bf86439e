"""Token choice whose second expert is used at random in training, the more often the more it weighs (GShard)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing
from moesaic.routers.token_choice import TokenChoiceRouter, check_top_k


class SampledTopKRouter(TokenChoiceRouter):
    """Keep the K best experts; in training use each but the first only with probability ``min(1, weight / threshold)``.

    Weights are the softmax over the K best, whichever of them are then used or dropped: a token that loses its second
    expert keeps the first at its own weight. A choice that is not used is not in the table, and takes no capacity. In
    training the router draws one uniform number for each token and choice after the first, in one call of shape
    (T, K - 1); evaluation uses every choice and draws none.

    Args:
        width: D, the width of a token.
        num_experts: E.
        top_k: K, 2 as published; more are sampled one by one, as the second is.
        threshold: weight from which on a choice is always used: 0.5 is GShard's ``2 * g2 > random``, 0.2 Mesh
            TensorFlow's and ST-MoE's; 0 uses every choice always.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of at most ``N = T * K`` rows, each token's best expert first.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts`` or 1, or ``threshold`` is negative.

    Source: GShard algorithm 1; Mesh TensorFlow, ``_top_2_gating`` with policy "random".
    """

    def __init__(
        self, width: int, num_experts: int, *, top_k: int = 2, threshold: float = 0.5, init: Init | None = None
    ) -> None:
        check_top_k(top_k, num_experts)
        if top_k == 1 and num_experts > 1:
            raise ConfigError(
                "top_k=1 needs weights that depend on the router, got a softmax over the one best expert, which is "
                "always 1. Use top_k=2, or the recipe switch."
            )
        if threshold < 0:
            raise ConfigError(f"threshold must be at least 0, got {threshold}. GShard uses 0.5, ST-MoE 0.2.")
        super().__init__(width, num_experts, top_k=top_k, init=init)
        self.threshold = threshold

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        expert_TK = self.chosen(logits_TE, scores_TE, context)
        weight_TK = logits_TE.gather(1, expert_TK).softmax(dim=-1)
        used_TK = torch.ones_like(weight_TK, dtype=torch.bool)
        if self.training:
            shape = (weight_TK.shape[0], self.top_k - 1)
            drawn = torch.rand(shape, dtype=weight_TK.dtype, device=weight_TK.device)
            used_TK[:, 1:] = weight_TK[:, 1:] >= self.threshold * drawn
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, expert_TK, used_TK)
        weight_TE = torch.zeros_like(logits_TE).scatter(1, expert_TK, weight_TK)
        return Routing.from_mask(chosen_TE, weight_TE, logits_TE, scores_TE, valid_T)
