"""Gating residuals: a layer's router also hears what the router of the MoE layer below thought (MoE++)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.autocast import without_autocast
from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.init import Init, normal
from moesaic.core.routing import Routing
from moesaic.routers.linear import widened
from moesaic.routers.token_choice import TokenChoiceRouter, check_top_k


class ResidualRouter(TokenChoiceRouter):
    """Top-K of a softmax of ``W x + W_below logits_of_the_layer_below``, for experts of two kinds.

    The weights are the probabilities as they are. The last ``num_special`` experts compute next to nothing; losses and
    capacities read from ``extras["eta_E"]`` that they are liked better: 1 for the others, ``tau`` for these.

    Args:
        width: D.
        num_experts: E, special ones counted.
        top_k: K.
        num_special: how many, standing last, are special.
        tau: how much a special expert counts in the loss; smaller sends more tokens there.
        net: "linear" as in the paper, or "tanh" for the authors' code: ``W_out tanh(W_in x)`` with 8 E hidden numbers.
        init: draws all maps.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th choice, best first.
        ``logits_TE`` has the residual in it: hand it to the layer above as ``Context.below_TE``. Without a layer below
        the residual is left out.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``, ``num_special`` leaves no ordinary expert, ``tau`` is
            not in ``(0, 1]``, or ``net`` is none of these.

    Source: Jin et al. 2024, "MoE++", section 3.2, eq. 6 and 7.
    """

    # A model keeps the logits of the layers below for it.
    uses_below = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int,
        num_special: int = 0,
        tau: float = 0.75,
        net: Literal["linear", "tanh"] = "linear",
        init: Init | None = None,
    ) -> None:
        check_top_k(top_k, num_experts)
        if not 0 <= num_special < num_experts:
            raise ConfigError(
                f"num_special must be at least 0 and below num_experts={num_experts}, got {num_special}. "
                "Leave at least one feed-forward expert."
            )
        if not 0 < tau <= 1:
            raise ConfigError(f"tau must be above 0 and at most 1, got {tau}. MoE++ uses 0.75.")
        if net not in ("linear", "tanh"):
            raise ConfigError(f"net must be 'linear' or 'tanh', got {net!r}. The paper has 'linear'.")
        super().__init__(width if net == "linear" else 8 * num_experts, num_experts, top_k=top_k, init=init)
        draw = init or normal(0.02)
        self.num_special = num_special
        self.tau = tau
        self.inner_weight = nn.Parameter(torch.empty(8 * num_experts, width)) if net == "tanh" else None
        self.below_weight = nn.Parameter(torch.empty(num_experts, num_experts))
        if self.inner_weight is not None:
            draw(self.inner_weight, width)
        draw(self.below_weight, num_experts)

    def logits(self, x_TD: Tensor) -> Tensor:
        """``W x``, or ``W_out tanh(W_in x)``, in float32 or wider; without the residual."""
        if self.inner_weight is None:
            return super().logits(x_TD)
        x_TD = widened(x_TD, self.inner_weight.shape[1])
        with without_autocast(x_TD.device):
            inner_TD = F.linear(x_TD, self.inner_weight.to(x_TD.dtype)).tanh()
        return super().logits(inner_TD)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self._with_residual(self.logits(x_TD), context.below_TE)
        scores_TE = logits_TE.softmax(dim=-1)
        expert_TK = self.chosen(logits_TE, scores_TE, context)
        weight_TK = scores_TE.gather(1, expert_TK)
        routing = Routing.from_choices(expert_TK, weight_TK, logits_TE, scores_TE, valid_T)
        eta_E = torch.ones(self.num_experts, dtype=scores_TE.dtype, device=scores_TE.device)
        eta_E[self.num_experts - self.num_special :] = self.tau
        return replace(routing, extras={"eta_E": eta_E})

    def _with_residual(self, logits_TE: Tensor, below_TE: Tensor | None) -> Tensor:
        if below_TE is None:
            # Attached though unused: a gradient of zeros and not None, so that data-parallel training never waits.
            return logits_TE + self.below_weight.flatten()[:0].sum().to(logits_TE.dtype)
        if below_TE.shape != logits_TE.shape:
            raise ShapeError(
                f"Context.below_TE must be {tuple(logits_TE.shape)}, one logit for each expert here, got "
                f"{tuple(below_TE.shape)}. Give all MoE layers the same num_experts."
            )
        with without_autocast(logits_TE.device):
            return logits_TE + F.linear(below_TE.to(logits_TE.dtype), self.below_weight.to(logits_TE.dtype))
