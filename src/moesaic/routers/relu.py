"""ReLU routing: an expert is active where its logit is positive, and the logit is its weight."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.init import Init
from moesaic.core.routing import Routing
from moesaic.routers.linear import LinearRouter
from moesaic.routers.token_choice import check_top_k


class ReLURouter(LinearRouter):
    """Weigh every expert by ``relu(x W)``; those of weight 0 do not run. No choice is made, so all is continuous.

    How many experts that makes is left to training: a loss on the weights whose coefficient a
    :class:`~moesaic.balance.SparsityController` moves until a token has ``top_k`` on average. At first about half
    of all experts are active. A token may have none.

    Args:
        width: D, the width of a token.
        num_experts: E.
        top_k: the average number of experts per token to train for. Nothing here enforces it.
        init: draws the initial weights; zeros would leave every expert inactive for good.
    Shape:
        ``(T, D)`` -> Routing of up to ``T * E`` rows, a token's largest weight first, with ``extras["top_k"]``, the
        target as a scalar, for :func:`~moesaic.balance.l1_loss`.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``.

    Source: Wang et al. 2024, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing".
    """

    def __init__(self, width: int, num_experts: int, *, top_k: int, init: Init | None = None) -> None:
        check_top_k(top_k, num_experts)
        super().__init__(width, num_experts, init=init)
        self.top_k = top_k

    @property
    def experts_per_token(self) -> float:
        """The target, which training reaches; a fresh router visits about half of all experts."""
        return float(self.top_k)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        weight_TE = logits_TE.relu()
        target = logits_TE.new_full((), self.top_k)
        return Routing.from_mask(weight_TE > 0, weight_TE, logits_TE, weight_TE, valid_T, extras={"top_k": target})
