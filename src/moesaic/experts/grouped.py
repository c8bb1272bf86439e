"""What stacked experts of any kind do with a plan: pick the kernel, settle the precision, run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from moesaic.core.errors import ShapeError
from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn import Choice, Kernel, choose


def pick(kernel: Kernel | str, weight: Tensor) -> Choice:
    """The kernel that serves experts with weights like this one, and why."""
    if isinstance(kernel, Kernel):
        return Choice(kernel=kernel, reason="handed in")
    return choose(kernel, weight.device, weight.dtype)


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
    choice = pick(cast("Kernel | str", kernel), next(experts.parameters()))
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
    device = x_TD.device.type
    cast = _autocast_to(device)
    with torch.autocast(device, enabled=False):
        up = cast(up_EDF)
        gate = None if gate_EDF is None else cast(gate_EDF)
        run = pick(kernel, up).kernel.run
        if weigh == "output":
            y_TD = run(cast(x_TD), plan, gate, up, cast(down_EFD), activation)
        else:
            x_ND, row_plan = _weighed_rows(x_TD, plan)
            y_ND = run(cast(x_ND), row_plan, gate, up, cast(down_EFD), activation)
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            token_N = plan.token_N[: x_ND.shape[0]]
            y_TD = torch.zeros_like(x_TD, dtype=wide).index_add(0, token_N, y_ND.to(wide))
    return y_TD.to(x_TD.dtype)


def _weighed_rows(x_TD: Tensor, plan: Plan) -> tuple[Tensor, Plan]:
    """The inputs of the rows that experts work on, each times its weight, and the plan that takes them one by one."""
    num_rows = int(plan.load_E.sum())
    weight_N = plan.weight_N[:num_rows, None]
    # The product in the router's precision, then rounded: rows of padding and dropped ones are not even read.
    x_ND = (x_TD[plan.token_N[:num_rows]].to(weight_N.dtype) * weight_N).to(x_TD.dtype)
    row_N = torch.arange(num_rows, device=x_TD.device)
    return x_ND, replace(plan, row_N=row_N, token_N=row_N, weight_N=torch.ones_like(plan.weight_N[:num_rows]))


def _autocast_to(device: str) -> Callable[[Tensor], Tensor]:
    if not torch.is_autocast_enabled(device):
        return lambda tensor: tensor
    dtype = torch.get_autocast_dtype(device)
    return lambda tensor: tensor.to(dtype)
