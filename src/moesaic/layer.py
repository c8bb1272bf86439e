"""START READING HERE. A Mixture-of-Experts layer, in the order in which a token meets its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, cast

from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing
from moesaic.dispatch import Sort
from moesaic.experts.grouped import pick
from moesaic.kernels.grouped_ffn import Kernel


class Router(Protocol):
    """Decides who goes where."""

    @property
    def num_experts(self) -> int:
        """Experts to choose from."""

    def __call__(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Routing:
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


class MoELayer(nn.Module):
    """A sparse feed-forward layer: route, dispatch, let the experts work, add the shared expert.

    Args:
        router: tokens to :class:`~moesaic.core.routing.Routing`.
        experts: tokens and plan to outputs.
        dispatch: Routing to :class:`~moesaic.core.plan.Plan`; dropless unless given.
        shared: a module that every token visits; its output is added.
    Shape:
        ``(T, D)`` -> ``(T, D)`` and the Routing. A token whose rows were all dropped gets zeros from the routed
        experts: add the layer's output to its input, as transformer blocks do.
    Raises:
        ConfigError: if router and experts differ in number of experts.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: nn.Module,
        *,
        dispatch: nn.Module | None = None,
        shared: nn.Module | None = None,
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

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Send each token through its experts.

        Args:
            x_TD: tokens.
            valid_T: False where a token is padding: it takes no expert, no capacity, no load and no loss.
        Returns:
            The outputs, and the table with ``kept_N`` telling which rows were dropped.
        """
        routing: Routing = self.router(x_TD, valid_T)  # who goes where
        plan: Plan = self.dispatch(routing)  # in which order, and what is dropped
        y_TD: Tensor = self.experts(x_TD, plan)  # gather, work, weigh, add
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD, replace(routing, kept_N=plan.kept_N)

    @property
    def num_params(self) -> int:
        """Parameters of the layer."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets: all but the experts it does not choose."""
        in_experts = sum(parameter.numel() for parameter in self.experts.parameters())
        router = cast("_TopK", self.router)
        return self.num_params - in_experts + in_experts * router.top_k // router.num_experts

    def kernel_report(self) -> str:
        """Which kernel the experts run on, and why."""
        kernel = getattr(self.experts, "kernel", None)
        if kernel is None:
            return f"{type(self.experts).__name__}: no kernel, each expert runs as its own module"
        choice = pick(cast("Kernel | str", kernel), next(self.experts.parameters()))
        return f"{choice.kernel.name}: {choice.kernel.what}; {choice.reason}"


class _TopK(Protocol):
    num_experts: int
    top_k: int
