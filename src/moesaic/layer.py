"""START READING HERE. A Mixture-of-Experts layer, in the order in which a token meets its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.exact import ExactBuffers
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing
from moesaic.dispatch import Sort
from moesaic.experts import GatedExperts, MLPExperts
from moesaic.experts.grouped import kernel_report
from moesaic.kernels.whole_layer import are_bare, is_at_hand, whole_layer
from moesaic.routers import TopKRouter


class Router(Protocol):
    """Decides who goes where."""

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""

    @property
    def experts_per_token(self) -> float:
        """How many experts a token visits, on average over a batch where the number differs."""

    def __call__(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""


class Dispatch(Protocol):
    """Decides in which order rows are worked, and which are dropped."""

    def __call__(self, routing: Routing) -> Plan:
        """Sort the table."""


class Experts(Protocol):
    """Work through the plan."""

    @property
    def num_experts(self) -> int:
        """How many experts there are."""

    def __call__(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Gather, work, weigh, add."""


class MoELayer(ExactBuffers):
    """A sparse feed-forward layer: route, dispatch, let the experts work, add what every token visits.

    Args:
        router: tokens to :class:`~moesaic.core.routing.Routing`.
        experts: tokens and plan to outputs.
        dispatch: Routing to :class:`~moesaic.core.plan.Plan`; dropless unless given.
        shared: a module that every token visits; its output is added.
        mix: a module that joins routed and shared outputs in another way, from (tokens, routed, shared).
        after: a module that runs on the input plus the output so far; its output is added (the extra feed-forward
            network of ST-MoE).
        coefficient: first value of a balance loss's coefficient that a controller moves; kept as a float32 buffer and
            read by losses as ``routing.extras["coefficient"]``.
    Shape:
        ``(T, D)`` -> ``(T, D)`` and the Routing. A token whose rows were all dropped gets zeros from the routed
        experts: add the layer's output to its input, as transformer blocks do.
    Raises:
        ConfigError: if router and experts differ in number of experts.
    """

    coefficient: Tensor | None

    def __init__(
        self,
        router: nn.Module,
        experts: nn.Module,
        *,
        dispatch: nn.Module | None = None,
        shared: nn.Module | None = None,
        mix: nn.Module | None = None,
        after: nn.Module | None = None,
        coefficient: float | None = None,
    ) -> None:
        super().__init__()
        num_routed, num_built = cast(Router, router).num_experts, cast(Experts, experts).num_experts
        if num_routed != num_built:
            raise ConfigError(
                f"router and experts must agree on num_experts, got {num_routed} and {num_built}. "
                "Build both with the same number."
            )
        self.router = router
        self.dispatch = dispatch if dispatch is not None else Sort()
        self.experts = experts
        self.shared = shared
        self.mix = mix
        self.after = after
        start = None if coefficient is None else torch.tensor(coefficient, dtype=torch.float32)
        self.register_exact("coefficient", start)

    def forward(
        self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT
    ) -> tuple[Tensor, Routing]:
        """Send each token through its experts.

        Args:
            x_TD: tokens.
            valid_T: False where a token is padding: it takes no expert, no capacity, no load and no loss.
            context: what some routers need beside the vectors: sequences, token ids, domains, logits from below.
        Returns:
            The outputs, and the table with ``kept_N`` telling which rows were dropped.
        """
        context.check(x_TD.shape[0])
        y_TD, routing = self._in_one_call(x_TD, valid_T, context) or self._in_steps(x_TD, valid_T, context)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            y_TD = y_TD + shared_TD if self.mix is None else self.mix(x_TD, y_TD, shared_TD)
        if self.after is not None:
            y_TD = y_TD + self.after(x_TD + y_TD)
        return y_TD, routing

    def _in_steps(self, x_TD: Tensor, valid_T: Tensor | None, context: Context) -> tuple[Tensor, Routing]:
        routing: Routing = self.router(x_TD, valid_T, context)  # who goes where
        if routing.sequence_T is not context.sequence_T:
            routing = replace(routing, sequence_T=context.sequence_T)
        plan: Plan = self.dispatch(routing)  # in which order, and what is dropped
        y_TD: Tensor = self.experts(x_TD, plan)  # gather, work, weigh, add
        return y_TD, replace(routing, kept_N=plan.kept_N, extras=self._stamped(routing))

    def _in_one_call(self, x_TD: Tensor, valid_T: Tensor | None, context: Context) -> tuple[Tensor, Routing] | None:
        """The same steps for the few tokens of generation, if C is compiled and knows all three parts."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_at_hand(x_TD):
            return None
        if context.choice_TK is not None or self.coefficient is not None:
            return None
        router, dispatch, experts = self.router, self.dispatch, self.experts
        # Classes derived from these may do anything else, and hooks want to see the parts called.
        if type(router) is not TopKRouter or type(dispatch) is not Sort:
            return None
        if type(experts) is not GatedExperts and type(experts) is not MLPExperts:
            return None
        if not are_bare(router, dispatch, experts):
            return None
        choice, stacks = router.plain_choice(), experts.plain_stacks()
        if choice is None or stacks is None:
            return None
        return whole_layer(x_TD, valid_T, context.sequence_T, choice, stacks)

    def _stamped(self, routing: Routing) -> Mapping[str, Tensor]:
        if self.coefficient is None:
            return routing.extras
        # A copy: a controller moves the buffer, and the graph must not see it move.
        return {**routing.extras, "coefficient": self.coefficient.clone()}

    @property
    def num_experts(self) -> int:
        """Routed experts."""
        return cast(Router, self.router).num_experts

    @property
    def num_params(self) -> int:
        """Parameters of the layer."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets: all but the experts it does not choose; an average where experts differ."""
        in_experts = sum(parameter.numel() for parameter in self.experts.parameters())
        # Low-rank experts share a network that every token meets.
        in_experts -= getattr(self.experts, "num_common_params", 0)
        router = cast(Router, self.router)
        return self.num_params - in_experts + round(in_experts * router.experts_per_token / router.num_experts)

    def kernel_report(self) -> str:
        """Which kernel the experts run on, and why."""
        return kernel_report(self.experts)
