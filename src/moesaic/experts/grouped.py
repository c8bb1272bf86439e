"""What stacked experts of any kind do with a plan: pick the kernel, settle the precision, run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from moesaic.core.autocast import without_autocast
from moesaic.core.errors import ShapeError
from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn import Choice, Kernel, Stacks, choose, grouped_ffn_native
from moesaic.kernels.grouped_ffn.by_token import add_up, live


def pick(kernel: Kernel | str, weight: Tensor, stacks: Stacks | None = None) -> Choice:
    """The kernel that serves experts with weights like this one, and why.

    Args:
        kernel: "auto", a kernel's name, or a kernel.
        weight: of their device and dtype.
        stacks: all of them, where they are at hand.
    """
    if isinstance(kernel, Kernel):
        return Choice(kernel=kernel, reason="handed in")
    return choose(kernel, weight.device, weight.dtype, stacks)


def may_be_native(kernel: Kernel | str) -> bool:
    """Whether a setting lets C run, where it is compiled."""
    return kernel in ("auto", "native") if isinstance(kernel, str) else kernel.run is grouped_ffn_native


def kernel_report(experts: nn.Module) -> str:
    """Which kernel some experts run on, and why."""
    # PEFT wraps experts that it adapts; it is still they who run.
    experts = getattr(experts, "get_base_layer", lambda: experts)()
    own_report = getattr(experts, "kernel_report", None)
    if own_report is not None:
        return cast(str, own_report())
    kernel = getattr(experts, "kernel", None)
    if kernel is None:
        return f"{type(experts).__name__}: no kernel, each expert runs as its own module"
    up_EDF, down_EFD = getattr(experts, "up_EDF", None), getattr(experts, "down_EFD", None)
    stacks = None if up_EDF is None or down_EFD is None else (getattr(experts, "gate_EDF", None), up_EDF, down_EFD)
    choice = pick(cast("Kernel | str", kernel), next(experts.parameters()), stacks)
    return f"{choice.kernel.name}: {choice.kernel.what}; {choice.reason}"


def run_grouped(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
    kernel: Kernel | str,
    weigh: Literal["output", "input"] = "output",
) -> Tensor:
    """Run the grouped feed-forward with the kernel that fits, under autocast in autocast's dtype.

    Args:
        x_TD: tokens.
        plan: rows sorted by expert.
        gate_EDF: gate projections; None for plain experts.
        up_EDF: up projections.
        down_EFD: down projections.
        activation: applied to the gate, or to the up projection where there is no gate.
        kernel: "auto", a kernel's name, or a kernel.
        weigh: multiply what comes out of an expert by the row's weight, or what goes in.
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
    cast = _autocast_to(x_TD.device.type)
    with without_autocast(x_TD.device):
        gate, up, down = None if gate_EDF is None else cast(gate_EDF), cast(up_EDF), cast(down_EFD)
        run = pick(kernel, up, (gate, up, down)).kernel.run
        if weigh == "output":
            y_TD = run(cast(x_TD), plan, gate, up, down, activation)
        else:
            x_ND, row_plan = _weighed_rows(x_TD, plan)
            y_TD = add_up(run(cast(x_ND), row_plan, gate, up, down, activation), plan, x_TD.shape[0])
    return y_TD if y_TD.dtype == x_TD.dtype else y_TD.to(x_TD.dtype)


def _weighed_rows(x_TD: Tensor, plan: Plan) -> tuple[Tensor, Plan]:
    """The inputs of a plan's rows, each times its weight, and the plan that takes them one by one."""
    num_rows = plan.token_N.shape[0]
    weight_N1 = plan.weight_N[:, None]
    # What padding or a dropped token holds stands in no product, not even times 0.
    x_ND = torch.where(live(plan.offset_E, num_rows)[:, None], x_TD[plan.token_N], 0)
    # The product in the router's precision, then rounded.
    x_ND = (x_ND.to(weight_N1.dtype) * weight_N1).to(x_TD.dtype)
    row_N = torch.arange(num_rows, device=x_TD.device)
    return x_ND, replace(plan, row_N=row_N, token_N=row_N, weight_N=torch.ones_like(plan.weight_N))


def _autocast_to(device: str) -> Callable[[Tensor], Tensor]:
    if not torch.is_autocast_enabled(device):
        return lambda tensor: tensor
    dtype = torch.get_autocast_dtype(device)
    return lambda tensor: tensor.to(dtype)
