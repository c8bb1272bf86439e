"""The attention router: experts look at each other before a token chooses among them."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing
from moesaic.routers.scores import softmax
from moesaic.routers.token_choice import TokenChoiceRouter, check_top_k


class AttentionRouter(TokenChoiceRouter):
    """Give each expert a query, a key and a value, all numbers: ``P = softmax(q k^T) v``; keep the K largest.

    ``q k^T`` is an outer product of two vectors over experts, without scaling; its softmax goes over keys. Weights are
    the softmax over the K chosen P. ``weight`` (3E, D) holds the maps to queries, keys and values, in this order.
    A token needs room for E * E numbers.

    Args:
        width: D, the width of a token.
        num_experts: E.
        top_k: experts per token, at least 2: alone, an expert would weigh 1 whatever the router says.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th choice, best first. Its
        logits are P.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``, or is 1 of several.

    Source: Yuan 2.0-M32 (2024), attention router, and the authors' inference code.
    """

    def __init__(self, width: int, num_experts: int, *, top_k: int = 2, init: Init | None = None) -> None:
        check_top_k(top_k, num_experts)
        if top_k == 1 and num_experts > 1:
            raise ConfigError(
                "top_k=1 needs weights that depend on the router, got a softmax over the one chosen expert, which is "
                "1 and cuts the router's gradient. Use top_k=2."
            )
        super().__init__(width, 3 * num_experts, top_k=top_k, init=init)

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""
        return self.weight.shape[0] // 3

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        query_TE, key_TE, value_TE = self.logits(x_TD).chunk(3, dim=-1)
        # No matrix product: autocast would round it to bfloat16.
        attention_TEE = (query_TE[:, :, None] * key_TE[:, None, :]).softmax(dim=-1)
        logits_TE = (attention_TEE * value_TE[:, None, :]).sum(dim=-1)
        scores_TE = softmax.of(logits_TE)
        expert_TK = self.chosen(logits_TE, scores_TE, context)
        weight_TK = logits_TE.gather(1, expert_TK).softmax(dim=-1)
        return Routing.from_choices(expert_TK, weight_TK, logits_TE, scores_TE, valid_T)
