"""Mixture of depths: one number per token says whether the block runs for it or is skipped."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing, checked_mask
from moesaic.routers.linear import LinearRouter
from moesaic.routers.ranks import rank_for_experts, share_of_groups


class DepthRouter(LinearRouter):
    """In training each expert takes the best share of every sequence; in evaluation each token that it rates above 0.

    A token's weight is the router's output as it is, negative ones too. Tokens that nobody takes have no row, so a
    layer adds exactly 0 to them. Training looks at whole sequences, later tokens too; evaluation at one token alone,
    which is why :func:`~moesaic.balance.depth_loss` teaches the outputs to be above 0 exactly where training chooses.

    Args:
        width: D.
        num_experts: E; 1 for the block's own feed-forward network. More choose independently of each other.
        capacity: share of a sequence's tokens that each expert takes in training, ``floor(capacity * n)`` and at
            least 1.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing, token by token, largest weight first. Scores are the sigmoids of the outputs.
    Raises:
        ConfigError: if ``capacity`` is not above 0 and at most 1.

    Source: Raposo et al. 2024, "Mixture-of-Depths", sections 3.3 to 3.5.
    """

    def __init__(self, width: int, num_experts: int = 1, *, capacity: float = 0.125, init: Init | None = None) -> None:
        if not 0 < capacity <= 1:
            raise ConfigError(
                f"capacity must be above 0 and at most 1, the whole sequence, got {capacity}. The paper uses 0.125."
            )
        super().__init__(width, num_experts, init=init)
        self.capacity = capacity

    @property
    def experts_per_token(self) -> float:
        """An average: ``capacity * E`` in training, and about that in evaluation once the router has learned it."""
        return self.capacity * self.num_experts

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        valid_T = checked_mask(valid_T, x_TD.shape[0], x_TD.device)
        if self.training:
            sequence_T = context.sequences(x_TD)
            take_T = share_of_groups(sequence_T, valid_T, self.capacity)
            chosen_TE = rank_for_experts(logits_TE, sequence_T, valid_T) < take_T[:, None]
        else:
            chosen_TE = logits_TE.detach() > 0
        return Routing.from_mask(chosen_TE & valid_T[:, None], logits_TE, logits_TE, logits_TE.sigmoid(), valid_T)
