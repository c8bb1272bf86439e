"""Experts of unequal size or kind in one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.plan import Plan


class MixedExperts(nn.ModuleList):
    """Several blocks of experts behind one router, each serving its own consecutive experts.

    Blocks may differ in size and in kind: four wide and four narrow networks, or networks and experts that only copy.
    Each block runs on the kernel that fits it, because a plan is sorted by expert and so falls into parts.

    Args:
        *parts: modules as :class:`~moesaic.experts.GatedExperts`; the first serves experts 0 to ``n - 1``, and so on.
    Shape:
        ``(T, D)`` and a plan -> ``(T, D)``. What the parts return, each in the tokens' dtype, is added in float32.
    Raises:
        ConfigError: if there is no part.
        ShapeError: if the plan is for another number of experts.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(parts)
        if not parts:
            raise ConfigError("MixedExperts needs at least one block of experts, got none. Pass GatedExperts(...).")

    @property
    def num_experts(self) -> int:
        """How many experts all parts have."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many experts each part has."""
        return tuple(int(part.num_experts) for part in self)  # type: ignore[arg-type]

    @property
    def kernel(self) -> Any:
        """The kernel that the first part which takes one was built with; None where none does."""
        return next((part.kernel for part in self if hasattr(part, "kernel")), None)

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Run each part over its experts' rows and add up what they return."""
        if plan.num_experts != self.num_experts:
            raise ShapeError(
                f"the plan must be for {self.num_experts} experts, got one for {plan.num_experts}. "
                "Build router and experts with the same num_experts."
            )
        y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        start = 0
        for part, size in zip(self, self.sizes, strict=True):
            y_TD = y_TD + part(x_TD, plan.only(start, start + size))
            start += size
        return y_TD.to(x_TD.dtype)
