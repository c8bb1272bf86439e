"""The grouped feed-forward with a hand-written backward: plain PyTorch, on any device.

Autograd over a loop of experts would keep each expert's gathered inputs and outputs, and add a full-size weight
gradient per expert. Here one graph node serves the layer: it saves only the pre-activations, gathers inputs again in
the backward, and writes each expert's weight gradient in its place. The router's gradient needs no expert outputs:
``<dy, hidden @ down> = <dy @ down^T, hidden>``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation


def grouped_ffn_torch(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
) -> Tensor:
    """Run each expert over its rows and add the weighted outputs up.

    Takes and gives what :func:`~moesaic.kernels.grouped_ffn.reference.grouped_ffn_reference` does; not twice
    differentiable.
    """
    y_TD: Tensor = _GroupedFFN.apply(  # type: ignore[no-untyped-call]
        x_TD, plan.weight_N, plan.token_N, plan.offset_E, gate_EDF, up_EDF, down_EFD, activation
    )
    return y_TD


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        token_N: Tensor,
        offset_E: Tensor,
        gate_EDF: Tensor | None,
        up_EDF: Tensor,
        down_EFD: Tensor,
        activation: Activation,
    ) -> Tensor:
        ends = offset_E.tolist()
        num_rows, hidden = ends[-1], up_EDF.shape[-1]
        up_NF = x_TD.new_empty(num_rows, hidden)
        gate_NF = None if gate_EDF is None else torch.empty_like(up_NF)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        y_TD = torch.zeros_like(x_TD, dtype=wide)
        for e, rows in _busy_experts(ends):
            token_M = token_N[rows]
            x_MD = x_TD.index_select(0, token_M)
            torch.mm(x_MD, up_EDF[e], out=up_NF[rows])
            if gate_NF is None or gate_EDF is None:
                hidden_MF = activation.forward(up_NF[rows])
            else:
                torch.mm(x_MD, gate_EDF[e], out=gate_NF[rows])
                hidden_MF = activation.forward(gate_NF[rows]).mul_(up_NF[rows])
            y_MD = torch.mm(hidden_MF, down_EFD[e]).to(wide).mul_(weight_N[rows, None])
            y_TD.index_add_(0, token_M, y_MD)
        ctx.save_for_backward(x_TD, weight_N, token_N, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF)
        ctx.activation, ctx.ends = activation, ends
        return y_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, token_N, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF = ctx.saved_tensors
        needs_x, _, _, _, needs_gate, needs_up, needs_down, _ = ctx.needs_input_grad
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        grad_x_TD = torch.zeros_like(x_TD, dtype=wide) if needs_x else None
        grad_weight_N = torch.zeros_like(weight_N)
        # An expert without rows keeps exact zeros.
        grad_gate_EDF = torch.zeros_like(gate_EDF) if needs_gate else None
        grad_up_EDF = torch.zeros_like(up_EDF) if needs_up else None
        grad_down_EFD = torch.zeros_like(down_EFD) if needs_down else None
        for e, rows in _busy_experts(ctx.ends):
            token_M = token_N[rows]
            grad_y_MD = grad_y_TD.index_select(0, token_M)
            grad_hidden_MF = torch.mm(grad_y_MD, down_EFD[e].t())
            up_MF = up_NF[rows]
            weight_M1 = weight_N[rows, None].to(x_TD.dtype)
            gate_MF = None if gate_NF is None else gate_NF[rows]
            activated_MF = ctx.activation.forward(up_MF if gate_MF is None else gate_MF)
            hidden_MF = activated_MF if gate_MF is None else activated_MF * up_MF
            grad_weight_N[rows] = (grad_hidden_MF.to(wide) * hidden_MF).sum(dim=-1).to(weight_N.dtype)
            if grad_down_EFD is not None:
                torch.mm((hidden_MF * weight_M1).t(), grad_y_MD, out=grad_down_EFD[e])
            grad_hidden_MF.mul_(weight_M1)
            grad_gate_MF: Tensor | None = None
            if gate_MF is None:
                grad_up_MF = ctx.activation.backward(grad_hidden_MF, up_MF)
            else:
                grad_up_MF = grad_hidden_MF * activated_MF
                grad_gate_MF = ctx.activation.backward(grad_hidden_MF.mul_(up_MF), gate_MF)
            x_MD = x_TD.index_select(0, token_M)
            if grad_up_EDF is not None:
                torch.mm(x_MD.t(), grad_up_MF, out=grad_up_EDF[e])
            if grad_gate_EDF is not None and grad_gate_MF is not None:
                torch.mm(x_MD.t(), grad_gate_MF, out=grad_gate_EDF[e])
            if grad_x_TD is not None:
                grad_x_MD = torch.mm(grad_up_MF, up_EDF[e].t())
                if grad_gate_MF is not None:
                    grad_x_MD.addmm_(grad_gate_MF, gate_EDF[e].t())
                grad_x_TD.index_add_(0, token_M, grad_x_MD.to(wide))
        grad_x = None if grad_x_TD is None else grad_x_TD.to(x_TD.dtype)
        return grad_x, grad_weight_N, None, None, grad_gate_EDF, grad_up_EDF, grad_down_EFD, None


def _busy_experts(ends: list[int]) -> list[tuple[int, slice]]:
    """Each expert that has rows, with their places."""
    starts = [0, *ends]
    return [(e, slice(starts[e], end)) for e, end in enumerate(ends) if end > starts[e]]
