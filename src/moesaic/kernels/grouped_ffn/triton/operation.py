"""The whole grouped feed-forward and its backward, as operations that ``torch.compile`` takes for one node each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.by_token import TokenRows
from moesaic.kernels.grouped_ffn.triton.steps import Batch, Steps, totals


def run(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
) -> Tensor:
    """Run each expert over its rows and add the weighted outputs up."""
    rows = TokenRows.of(plan, x_TD.shape[0])
    weight_N, token_N, offset_E = (one.contiguous() for one in (plan.weight_N, plan.token_N, plan.offset_E))
    inputs = (x_TD, weight_N, token_N, offset_E, rows.place_N, rows.bounds, up_EDF, down_EFD, gate_EDF)
    saved = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    y_TD: Tensor = _GroupedFFN.apply(activation.name, saved, *inputs)  # type: ignore[no-untyped-call]
    return y_TD


@torch.library.custom_op("moesaic::grouped_ffn", mutates_args=())
def grouped_ffn(batch: list[Tensor], activation: str, saved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and, if ``saved``, the pre-activations of gate and up; empty where there are none.

    Args:
        batch: what :class:`~moesaic.kernels.grouped_ffn.triton.steps.Batch` holds, without the gate if there is none.
    """
    y_TD, gate_NF, up_NF = _room_for_outputs(batch, activation, saved)
    if batch[2].shape[0] == 0:
        return y_TD.zero_(), gate_NF, up_NF
    given = Batch(*batch)
    steps = Steps(given, activation)
    y_ND = steps.outputs(steps.hidden(gate_NF, up_NF, saved=saved))
    return totals(y_ND, given.place_N, given.bounds, given.weight_N, y_TD), gate_NF, up_NF


@grouped_ffn.register_fake
def _room_for_outputs(batch: list[Tensor], activation: str, saved: bool) -> tuple[Tensor, Tensor, Tensor]:
    given = Batch(*batch)
    num_saved, hidden = given.token_N.shape[0] if saved else 0, given.up_EDF.shape[2]
    gate_NF = given.x_TD.new_empty(0 if given.gate_EDF is None else num_saved, hidden)
    return given.x_TD.new_empty(given.x_TD.shape), gate_NF, given.x_TD.new_empty(num_saved, hidden)


@torch.library.custom_op("moesaic::grouped_ffn_backward", mutates_args=())
def grouped_ffn_backward(
    grad_y_TD: Tensor, batch: list[Tensor], gate_NF: Tensor, up_NF: Tensor, activation: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the rows' weights, of up, down and gate; empty where ``needs``, in this order, has False."""
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _room_for_gradients(
        grad_y_TD, batch, gate_NF, up_NF, activation, needs
    )
    if batch[2].shape[0] == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_x_TD, grad_weight_N, grad_up_EDF, grad_down_EFD, grad_gate_EDF = grads
    given = Batch(*batch)
    steps = Steps(given, activation)
    grad_y_TD = grad_y_TD.contiguous()
    found_N, grad_gate_NF, grad_up_NF, weighed_NF = steps.hidden_gradients(grad_y_TD, gate_NF, up_NF)
    if needs[1]:
        grad_weight_N.copy_(found_N)
    if needs[3]:
        steps.matrix_gradients(weighed_NF, (grad_y_TD,), (grad_down_EFD,), by_token=False)
    del weighed_NF
    pairs = ((needs[4], grad_gate_NF, grad_gate_EDF), (needs[2], grad_up_NF, grad_up_EDF))
    wanted = [(grad_NF, out_EDF) for is_wanted, grad_NF, out_EDF in pairs if is_wanted]
    if wanted:
        grads_NF, outs_EDF = zip(*wanted, strict=True)
        steps.matrix_gradients(given.x_TD.contiguous(), grads_NF, outs_EDF, by_token=True)
    if needs[0]:
        totals(steps.input_gradients(grad_gate_NF, grad_up_NF), given.place_N, given.bounds, None, grad_x_TD)
    return grads


@grouped_ffn_backward.register_fake
def _room_for_gradients(
    grad_y_TD: Tensor, batch: list[Tensor], gate_NF: Tensor, up_NF: Tensor, activation: str, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = Batch(*batch)

    def empty() -> Tensor:  # a new one each time: what an operation gives must not share memory
        return up_NF.new_empty(0)

    # Tokens are written one after the other, matrices in the steps of the weights.
    return (
        given.x_TD.new_empty(given.x_TD.shape) if needs[0] else empty(),
        given.weight_N.new_empty(given.weight_N.shape) if needs[1] else empty(),
        torch.empty_like(given.up_EDF) if needs[2] else empty(),
        torch.empty_like(given.down_EFD) if needs[3] else empty(),
        torch.empty_like(given.gate_EDF) if needs[4] and given.gate_EDF is not None else empty(),
    )


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: str, saved: bool, *inputs: Tensor | None) -> Tensor:
        y_TD: Tensor
        y_TD, gate_NF, up_NF = grouped_ffn([one for one in inputs if one is not None], activation, saved)
        ctx.save_for_backward(*inputs, gate_NF, up_NF)
        ctx.activation = activation
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gate_NF, up_NF = ctx.saved_tensors
        _, _, x, weight, _, _, _, _, up, down, gate = ctx.needs_input_grad
        needs = [x, weight, up, down, gate]
        batch = [one for one in inputs if one is not None]
        grads = grouped_ffn_backward(grad_y_TD, batch, gate_NF, up_NF, ctx.activation, needs)
        x_TD, weight_N, up_EDF, down_EFD, gate_EDF = (
            grad if is_wanted else None for grad, is_wanted in zip(grads, needs, strict=True)
        )
        return None, None, x_TD, weight_N, None, None, None, None, up_EDF, down_EFD, gate_EDF
