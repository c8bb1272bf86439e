"""What stacked experts of any kind do with a plan: pick the kernel, settle the precision, run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.core.errors import ShapeError
from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn import Choice, Kernel, choose


def pick(kernel: Kernel | str, weight: Tensor) -> Choice:
    """The kernel that serves experts with weights like this one, and why."""
    if isinstance(kernel, Kernel):
        return Choice(kernel=kernel, reason="handed in")
    return choose(kernel, weight.device, weight.dtype)


def run_grouped(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
    kernel: Kernel | str,
) -> Tensor:
    """Run the grouped feed-forward with the kernel that fits, under autocast in autocast's dtype.

    Raises:
        ShapeError: if tokens and experts differ in width, or plan and experts in number.
    """
    num_experts, width, _ = up_EDF.shape
    if x_TD.ndim != 2 or x_TD.shape[1] != width:
        raise ShapeError(
            f"x_TD must be (tokens, {width}), got {tuple(x_TD.shape)}. Build experts of the tokens' width."
        )
    if plan.num_experts != num_experts:
        raise ShapeError(
            f"the plan must be for {num_experts} experts, got one for {plan.num_experts}. "
            "Build router and experts with the same num_experts."
        )
    device = x_TD.device.type
    cast = _autocast_to(device)
    with torch.autocast(device, enabled=False):
        up = cast(up_EDF)
        gate = None if gate_EDF is None else cast(gate_EDF)
        y_TD = pick(kernel, up).kernel.run(cast(x_TD), plan, gate, up, cast(down_EFD), activation)
    return y_TD.to(x_TD.dtype)


def _autocast_to(device: str) -> Callable[[Tensor], Tensor]:
    if not torch.is_autocast_enabled(device):
        return lambda tensor: tensor
    dtype = torch.get_autocast_dtype(device)
    return lambda tensor: tensor.to(dtype)
