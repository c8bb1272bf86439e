"""What routers share in which each token chooses its K best experts: the choice, and the bias that may steer it."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.routers.linear import LinearRouter
from moesaic.routers.select import select_top_k


class TokenChoiceRouter(LinearRouter):
    """Choose the K experts with the largest logits, or with the largest scores plus a selection bias.

    Args:
        width: D, the width of a token.
        num_outputs: rows of the linear map, E unless a router makes more of them.
        top_k: K.
        jitter: see :class:`~moesaic.routers.LinearRouter`.
        logit_bias: see :class:`~moesaic.routers.LinearRouter`.
        init: draws the initial weights.
    """

    bias_E: Tensor | None

    def __init__(
        self,
        width: int,
        num_outputs: int,
        *,
        top_k: int,
        jitter: float = 0.0,
        logit_bias: bool = False,
        init: Init | None = None,
    ) -> None:
        super().__init__(width, num_outputs, jitter=jitter, logit_bias=logit_bias, init=init)
        self.top_k = top_k
        self.register_exact("bias_E", None)

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def add_selection_bias(self) -> None:
        """Keep a float32 ``bias_E`` from now on, of zeros, where the weight is; nothing if there is one already.

        Before weights are loaded and before the router is wrapped for training: the bias is part of its state. From
        then on experts are chosen by score plus bias and no longer by their logits, which is the same choice while
        the bias is 0, unless scores round together. Weights stay those of the scores (DeepSeek-V3 eq. 16).
        """
        if self.bias_E is None:
            zeros_E = torch.zeros(self.num_experts, dtype=torch.float32, device=self.weight.device)
            self.register_exact("bias_E", zeros_E)

    def chosen(self, logits_TE: Tensor, scores_TE: Tensor, context: Context) -> Tensor:
        """The K experts of each token (T, K): those that are known already, or this router's choice."""
        return self.choose(logits_TE, scores_TE) if context.choice_TK is None else context.choice_TK

    def choose(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """The K chosen experts of each token, best first (T, K), without a gradient."""
        if self.bias_E is None:
            # Logits order experts as their scores do, and stay apart where a score has underflowed or saturated.
            return select_top_k(logits_TE, self.top_k)
        return select_top_k(scores_TE.detach() + self.bias_E.to(scores_TE.dtype), self.top_k)


def check_top_k(top_k: int, num_experts: int) -> None:
    """Refuse more choices than there are experts, or none.

    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``.
    """
    if not 1 <= top_k <= num_experts:
        raise ConfigError(
            f"top_k must be between 1 and num_experts={num_experts}, got {top_k}. Lower top_k, or add experts."
        )
