"""Random routing: no router at all, an expert drawn for each sequence (THOR)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.exact import ExactBuffers
from moesaic.core.routing import Routing
from moesaic.routers.fixed import given_choices


class RandomRouter(ExactBuffers):
    """In training one expert, drawn uniformly, for all tokens of a sequence; in evaluation all experts, averaged.

    Training draws ``torch.randint(E, (S,))`` once per call, one number for each sequence up to the last one of
    ``Context.sequence_T``. Evaluation draws nothing: each expert has weight ``1 / E``.

    Args:
        num_experts: E.
    Shape:
        ``(T, D)`` -> Routing of T rows in training, ``T * E`` in evaluation. Scores and logits are those of
        :func:`~moesaic.routers.fixed.given_choices`: no balance loss can train anything here.
    Raises:
        ConfigError: if ``num_experts`` is below 1.

    Source: Zuo et al. 2021, "Taming Sparsely Activated Transformer with Stochastic Experts".
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise ConfigError(f"num_experts must be at least 1, got {num_experts}. THOR uses 2.")
        self.num_experts = num_experts

    @property
    def experts_per_token(self) -> float:
        """1, what training computes; evaluation runs all experts."""
        return 1.0

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Draw an expert for each sequence, or name them all."""
        if self.training:
            sequence_T = context.sequences(x_TD)
            num_sequences = int(sequence_T.max()) + 1 if sequence_T.numel() else 0
            expert_S = torch.randint(self.num_experts, (num_sequences,), device=x_TD.device)
            expert_TK = expert_S[sequence_T, None]
        else:
            expert_TK = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        return given_choices(expert_TK, self.num_experts, x_TD, valid_T)
