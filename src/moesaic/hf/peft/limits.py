"""Keep what was not chosen of a stack's low-rank change at exactly zero, whatever optimizer runs over it.

PEFT gives every expert of a stack a pair of matrices: A of (experts x rank, inputs), B of (outputs, rank x experts).
Where A and B of an expert are both 0, so are both gradients, each being a product with the other: the expert stays at
0 under weight decay, momentum and clipping, in any optimizer, and after it is saved and loaded. A projection that
shares its A with another, as gate and up do in a fused stack, has a gradient in its rows of B: that one is cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.hf.peft.blocks import Stack


def pair(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of one adapter in one of PEFT's layers."""
    return layer.get_parameter(f"lora_A.{adapter}.weight"), layer.get_parameter(f"lora_B.{adapter}.weight")


class Cut:
    """A gradient hook that keeps some entries and puts 0 in the place of the others.

    Args:
        kept: True where a gradient passes; it broadcasts against the gradient.
    """

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def __call__(self, gradient: Tensor) -> Tensor:
        """The gradient that the optimizer sees."""
        # Not a product: what is not finite must not get through as NaN.
        return torch.where(self.kept.to(gradient.device), gradient, 0)


@torch.no_grad()
def limit(wrapper: Any, stack: Stack, ranks: Mapping[int, int], projections: tuple[str, ...], adapter: str) -> None:
    """Zero and hold what is not chosen of one stack's low-rank change.

    Args:
        wrapper: PEFT's, around the module that holds the stack.
        stack: the parameter that it adapts.
        ranks: of each chosen expert.
        projections: the chosen ones.
        adapter: its name in the wrapper.
    """
    into, out = pair(wrapper, adapter)
    num_experts = wrapper.num_experts
    into_ERD = into.view(num_experts, -1, into.shape[1])
    out_FRE = out.view(out.shape[0], -1, num_experts)
    for expert in range(num_experts):
        rank = ranks.get(expert, 0)
        into_ERD[expert, rank:] = 0
        out_FRE[:, rank:, expert] = 0
    if set(stack.where) <= set(projections):
        return
    kept = torch.zeros(wrapper.get_param().shape[stack.dim], dtype=torch.bool, device=into.device)
    for projection in projections:
        if projection in stack.where:
            kept[stack.where[projection]] = True
    if in_rows_of_out(wrapper, stack):
        _hold(out, kept[:, None])
    else:
        _hold(into, kept[None, :])


@torch.no_grad()
def limit_rank(layer: Any, rank: int, adapter: str) -> None:
    """Zero what a linear map's adapter has beyond a rank; it stays 0."""
    into, out = pair(layer, adapter)
    into[rank:] = 0
    out[:, rank:] = 0


def in_rows_of_out(wrapper: Any, stack: Stack) -> bool:
    """Whether a stack's projections lie along the rows of B; else they lie along the columns of A."""
    # PEFT takes (experts, outputs, inputs) for granted where the module does not say is_transposed.
    is_transposed = bool(getattr(wrapper.get_base_layer(), "is_transposed", False))
    return (stack.dim == 2) == is_transposed


def _hold(weight: nn.Parameter, kept: Tensor) -> None:
    weight.masked_fill_(~kept, 0)
    weight.register_hook(Cut(kept))  # type: ignore[no-untyped-call]
