"""All experts for every token, weighted by a softmax: the mixture of experts before it was sparse."""

from __future__ import annotations

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


class DenseRouter(LinearRouter):
    """Send every token to every expert, weighted by the softmax of the logits; in evaluation, if told so, to a few.

    Args:
        width: D, the width of a token.
        num_experts: E.
        eval_top_k: most experts per token in evaluation; None keeps all.
        eval_threshold: in evaluation an expert must have more than this probability; 0 asks for nothing. A token's
            best expert stays whatever its probability.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of ``T * E`` rows, fewer in evaluation if told so, a token's largest weight first.
        Weights are never renormalised, so that evaluation with all experts is training's forward pass.
    Raises:
        ConfigError: if ``eval_top_k`` is not in ``1..num_experts``, or ``eval_threshold`` not in ``[0, 1)``.

    Source: Jacobs et al. 1991, "Adaptive Mixtures of Local Experts"; Pan et al. 2024, DS-MoE, for evaluation.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        eval_top_k: int | None = None,
        eval_threshold: float = 0.0,
        init: Init | None = None,
    ) -> None:
        if eval_top_k is not None:
            check_top_k(eval_top_k, num_experts)
        if not 0 <= eval_threshold < 1:
            raise ConfigError(
                f"eval_threshold must be at least 0 and less than 1, got {eval_threshold}. "
                "It is compared with probabilities: try 1 / num_experts."
            )
        super().__init__(width, num_experts, init=init)
        self.eval_top_k = eval_top_k
        self.eval_threshold = eval_threshold

    @property
    def experts_per_token(self) -> float:
        """All in training; in evaluation the most that a token keeps, of which a threshold may leave fewer."""
        if self.training or self.eval_top_k is None:
            return float(self.num_experts)
        return float(self.eval_top_k)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        probability_TE = softmax.of(logits_TE)
        chosen_TE = torch.ones_like(probability_TE, dtype=torch.bool)
        if not self.training:
            chosen_TE = best_above(
                logits_TE.detach(), probability_TE.detach(), self.eval_threshold, self.eval_top_k or self.num_experts
            )
        return Routing.from_mask(chosen_TE, probability_TE, logits_TE, probability_TE, valid_T)


def best_above(logits_TE: Tensor, probability_TE: Tensor, threshold: float, top_k: int) -> Tensor:
    """True for a token's best expert, and for those of its ``top_k`` best whose probability exceeds the threshold.

    A threshold of 0 leaves nobody out, not even a probability that has underflowed.
    """
    order_TK = select_top_k(logits_TE, top_k)
    taken_TK = torch.ones_like(order_TK, dtype=torch.bool)
    if threshold > 0:
        taken_TK = probability_TE.gather(1, order_TK) > threshold
        taken_TK[:, 0] = True
    return torch.zeros_like(probability_TE, dtype=torch.bool).scatter(1, order_TK, taken_TK)
