"""A router of our own that computes what a spec says: any family's routing, behind the contract of our layers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing
from moesaic.hf.native.router_spec import RouterSpec
from moesaic.routers.linear import LinearRouter


class SpecRouter(LinearRouter):
    """Route as a family of transformers does, in float32 or wider.

    Args:
        width: D, the width of a token.
        spec: what the family does.
        logit_bias: see :class:`~moesaic.routers.LinearRouter`.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of ``N = T * K`` rows; row ``t * K + k`` is token ``t``'s ``k``-th choice, best first.
    Raises:
        ConfigError: if the spec's choices are looked up or told from outside, or its weights need more than logits.
    """

    bias_E: Tensor | None

    def __init__(self, width: int, spec: RouterSpec, *, logit_bias: bool = False, init: Init | None = None) -> None:
        if not spec.is_learned or spec.expert_scale or spec.global_scale or spec.shared_gates:
            raise ConfigError(
                "SpecRouter needs a spec whose choices and weights come from logits alone, got policy "
                f"{spec.policy!r}, expert_scale={spec.expert_scale}, shared_gates={spec.shared_gates}. "
                "Adopt the model itself."
            )
        super().__init__(width, spec.num_experts, logit_bias=logit_bias, init=init)
        self.spec = spec
        zeros_E = torch.zeros(spec.num_experts, dtype=torch.float32) if spec.selection_bias else None
        self.register_exact("bias_E", zeros_E)

    @property
    def experts_per_token(self) -> float:
        """K."""
        return float(self.spec.top_k)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.spec.finish(self.logits(x_TD))
        scores_TE = self.spec.scores(logits_TE)
        expert_TK = context.choice_TK
        if expert_TK is None:
            expert_TK = self.spec.choose(logits_TE, scores_TE, self.bias_E)
        weight_TK, _ = self.spec.weights(logits_TE, scores_TE, expert_TK)
        routing = Routing.from_choices(expert_TK, weight_TK, logits_TE, scores_TE, valid_T)
        return replace(routing, extras=self.spec.extras(x_TD.device))


class RoutedOnly(nn.Module):
    """A layer that only routes: what balance terms are tried on.

    Args:
        router: routes.
    """

    def __init__(self, router: SpecRouter) -> None:
        super().__init__()
        self.router = router

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.num_experts

    def forward(
        self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT
    ) -> tuple[Tensor, Routing]:
        """The tokens as they came, and their routing."""
        return x_TD, self.router(x_TD, valid_T, context)
