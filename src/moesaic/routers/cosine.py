"""Cosine routing: tokens and experts as directions on a small sphere, so that neither can win by its length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.autocast import without_autocast
from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init, normal
from moesaic.core.routing import Routing
from moesaic.routers.scores import Score, softmax
from moesaic.routers.token_choice import TokenChoiceRouter, check_top_k

SHORTEST = 1e-4
"""Shorter vectors are not stretched to length 1: the gradient of a vanishing token must stay bounded."""


class CosineRouter(TokenChoiceRouter):
    """Project tokens to a few dimensions, score experts by the cosine with their embeddings over a temperature.

    ``weight`` is the projection (R, D), ``embedding_ER`` the experts' directions, ``log_temperature`` the logarithm
    of the learned temperature, so that it stays positive.

    Args:
        width: D, the width of a token.
        num_experts: E.
        top_k: experts per token.
        inner_width: R, the dimension that both are compared in.
        score: softmax or sigmoid, applied to ``cosine / temperature``; the K chosen scores weigh as they are.
        temperature: to start from.
        init: draws projection and embeddings.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th choice, best first.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``, or ``inner_width`` or ``temperature`` is not positive.

    Source: Chi et al. 2022, "On the Representation Collapse of Sparse Mixture of Experts" (X-MoE).
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        inner_width: int,
        score: Score = softmax,
        temperature: float = 0.3,
        init: Init | None = None,
    ) -> None:
        check_top_k(top_k, num_experts)
        if inner_width < 1:
            raise ConfigError(f"inner_width must be at least 1, got {inner_width}. X-MoE uses num_experts / 2.")
        if temperature <= 0:
            raise ConfigError(f"temperature must be positive, got {temperature}. X-MoE starts at 0.3.")
        super().__init__(width, inner_width, top_k=top_k, init=init)
        self.score = score
        self.embedding_ER = nn.Parameter(torch.empty(num_experts, inner_width))
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())
        (init or normal(0.02))(self.embedding_ER, inner_width)

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""
        return self.embedding_ER.shape[0]

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens; its logits are the cosines over the temperature."""
        token_TR = self.logits(x_TD)
        dtype = token_TR.dtype
        with without_autocast(x_TD.device):
            token_TR = F.normalize(token_TR, dim=-1, eps=SHORTEST)
            expert_ER = F.normalize(self.embedding_ER.to(dtype), dim=-1, eps=SHORTEST)
            logits_TE = F.linear(token_TR, expert_ER) * self.log_temperature.to(dtype).neg().exp()
        scores_TE = self.score.of(logits_TE)
        expert_TK = self.chosen(logits_TE, scores_TE, context)
        return Routing.from_choices(expert_TK, scores_TE.gather(1, expert_TK), logits_TE, scores_TE, valid_T)
