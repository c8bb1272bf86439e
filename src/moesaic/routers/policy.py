"""Routing as a policy: experts are drawn at random in training, and the reward of the draw trains the router."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.init import Init
from moesaic.core.routing import Routing
from moesaic.routers.annealed import exponential_like
from moesaic.routers.linear import LinearRouter
from moesaic.routers.scores import softmax
from moesaic.routers.select import select_top_k
from moesaic.routers.token_choice import check_top_k


class PolicyRouter(LinearRouter):
    """In training, draw K different experts from the softmax of the logits; in evaluation, take the K best.

    Every chosen expert weighs ``1 / K``. So no gradient of the outputs reaches the router, which learns from
    :func:`~moesaic.balance.reinforce_loss` alone.

    The draw is one exponential for each (token, expert): the K largest ``logit - log(exponential)``, in falling order,
    are a draw without replacement, one expert after the other (the Gumbel top-k trick, Kool et al. 2019).

    Args:
        width: D, the width of a token.
        num_experts: E.
        top_k: experts per token.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th draw, or in evaluation
        its ``k``-th best.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``.

    Source: Clark et al. 2022, "Unified Scaling Laws for Routed Language Models", RL-R; first for blocks of hidden units
    by Bengio et al. 2015, "Conditional Computation in Neural Networks for Faster Models".
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
        by_TE = logits_TE.detach()
        if self.training:
            by_TE = by_TE - exponential_like(by_TE).log()
        expert_TK = select_top_k(by_TE, self.top_k)
        # Attached by an empty sum: without a reward the router gets a gradient of zeros and not None, for which
        # data-parallel training would wait.
        weight_TK = (logits_TE[:0].sum() + 1 / self.top_k).expand(expert_TK.shape)
        return Routing.from_choices(expert_TK, weight_TK, logits_TE, softmax.of(logits_TE), valid_T)
