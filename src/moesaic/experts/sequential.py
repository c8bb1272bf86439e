"""Any modules as experts, one after the other: for experts that no kernel knows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.plan import Plan


class SequentialExperts(nn.ModuleList):
    """Experts of any kind, each a module from ``(M, D)`` to ``(M, D)``; they may differ in size and in kind.

    Args:
        experts: one module for each expert.
    Shape:
        ``(T, D)`` and a plan -> ``(T, D)``.
    Raises:
        ConfigError: if there is no expert.
        ShapeError: if an expert changes the shape of its rows, or the plan is for another number of experts.
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        if len(self) == 0:
            raise ConfigError("SequentialExperts needs at least one expert, got none. Pass a list of modules.")

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return len(self)

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Run each expert over its rows; weigh and add what they return."""
        if plan.num_experts != len(self):
            raise ShapeError(
                f"the plan must be for {len(self)} experts, got one for {plan.num_experts}. "
                "Build router and experts with the same num_experts."
            )
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        # Attached to tokens and weights even where no expert gets a row: what made them gets zeros and not None.
        y_TD = torch.zeros_like(x_TD, dtype=wide) + x_TD[:0].sum(dtype=wide) + plan.weight_N[:0].sum(dtype=wide)
        ends = plan.offset_E.tolist()
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if start == end:
                y_TD = y_TD + _zero_attached_to(self[e], y_TD)
                continue
            token_M = plan.token_N[start:end]
            x_MD = x_TD[token_M]
            y_MD = self[e](x_MD)
            if y_MD.shape != x_MD.shape:
                raise ShapeError(
                    f"expert {e} must return its rows in the shape it got, {tuple(x_MD.shape)}, got "
                    f"{tuple(y_MD.shape)}. Let every expert map width to width."
                )
            y_TD = y_TD.index_add(0, token_M, y_MD.to(wide) * plan.weight_N[start:end, None].to(wide))
        return y_TD.to(x_TD.dtype)


def _zero_attached_to(expert: nn.Module, like: Tensor) -> Tensor:
    """A zero whose gradient to every parameter is zeros, not None, so that data-parallel training never waits for it.

    It sums empty slices: no parameter is read, so not even a NaN in one can leak.
    """
    return sum((p.flatten()[:0].sum().to(like.dtype) for p in expert.parameters()), start=like.new_zeros(()))
