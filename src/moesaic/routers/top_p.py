"""Top-p: each token takes its best experts until their probabilities add up to p, few if it is sure, more if not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing
from moesaic.routers.linear import LinearRouter
from moesaic.routers.scores import softmax
from moesaic.routers.select import select_top_k
from moesaic.routers.token_choice import check_top_k


class TopPRouter(LinearRouter):
    """Keep the fewest experts whose softmax probabilities add up to at least ``p``, the one that crosses it included.

    Their weights are the probabilities as they are, so they add up to between p and 1, and one expert alone still
    trains the router.

    Args:
        width: D, the width of a token.
        num_experts: E.
        p: the probability to reach, above 0 and at most 1; 1 keeps every expert.
        top_k: most experts of one token; None sets no bound but the one that p sets.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of at least T and at most ``T * ceil(p E)`` rows, a token's best expert first.
    Raises:
        ConfigError: if ``p`` is not in ``(0, 1]``, or ``top_k`` not in ``1..num_experts``.

    Source: Huang et al. 2024, "Harder Tasks Need More Experts", and the authors' code.
    """

    def __init__(
        self, width: int, num_experts: int, *, p: float = 0.4, top_k: int | None = None, init: Init | None = None
    ) -> None:
        if not 0 < p <= 1:
            raise ConfigError(f"p must be above 0 and at most 1, got {p}. Huang et al. use 0.4.")
        if top_k is not None:
            check_top_k(top_k, num_experts)
        super().__init__(width, num_experts, init=init)
        self.p = p
        self.top_k = top_k

    @property
    def experts_per_token(self) -> float:
        """The most that a token can visit: ``ceil(p E)`` or ``top_k``, which an undecided router needs.

        A trained router visits fewer, 1.76 of 16 in the paper: telemetry tells how many.
        """
        # The k best of E probabilities add up to k / E at least. 0.07 * 100 is 7.000000000000001: no expert for that.
        most = math.ceil(self.p * self.num_experts - 1e-9)
        return float(most if self.top_k is None else min(most, self.top_k))

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        probability_TE = softmax.of(logits_TE)
        chosen_TE = self._select(logits_TE.detach(), probability_TE.detach())
        return Routing.from_mask(chosen_TE, probability_TE, logits_TE, probability_TE, valid_T)

    def _select(self, logits_TE: Tensor, probability_TE: Tensor) -> Tensor:
        order_TE = select_top_k(logits_TE, self.num_experts)
        taken_TE = torch.ones_like(order_TE, dtype=torch.bool)
        if self.p < 1:  # at 1 nothing is left out, though the sum may round to 1 before the last
            # What better experts add up to. As a product, which unlike cumsum adds in the same order on every device;
            # float64, which neither autocast nor TF32 narrows.
            better_EE = torch.ones(2 * [self.num_experts], dtype=torch.float64, device=order_TE.device).triu(1)
            taken_TE = probability_TE.gather(1, order_TE).double() @ better_EE < self.p
        if self.top_k is not None:
            taken_TE = taken_TE & (torch.arange(self.num_experts, device=order_TE.device) < self.top_k)
        return torch.zeros_like(taken_TE).scatter(1, order_TE, taken_TE)
