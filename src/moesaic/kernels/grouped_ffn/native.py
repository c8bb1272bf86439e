"""The grouped feed-forward by kernels in C, once they are compiled.

A few rows are run by reading each weight once, as fast as memory gives it. Many rows go through products that gather
tokens and apply activations on their way, where the processor has what these are made of (AVX512, for bfloat16
AVX512_BF16); elsewhere they run as in :mod:`~moesaic.kernels.grouped_ffn.torch`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.core.errors import BackendError, ShapeError
from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.layout import gradients_like
from moesaic.kernels.grouped_ffn.torch import SMALL_LAYER, grouped_ffn_torch
from moesaic.kernels.memory import large_empty
from moesaic.kernels.native import build
from moesaic.kernels.native.build import Compiled, Job, Stack
from moesaic.kernels.native.calls import DONE, NO_MEMORY, are_operations_watched
from moesaic.kernels.side_by_side import share_out

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4}
"""As in activations.h."""


def native_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels in C cannot run somewhere, or None."""
    if device.type != "cpu":
        return "it is C for CPUs"
    if dtype not in (torch.float32, torch.bfloat16):
        return "it takes float32 and bfloat16"
    if build.compiled() is None:
        return "it is not compiled on this machine: run `moesaic native`"
    return None


def native_misfits(gate_EDF: Tensor | None, up_EDF: Tensor, down_EFD: Tensor) -> str | None:
    """Why the kernels in C cannot take some weights, or None."""
    for name, stack in (("gate", gate_EDF), ("up", up_EDF), ("down", down_EFD)):
        if stack is not None and 1 not in stack.stride()[1:]:
            return (
                "native needs each expert's matrix row by row or column by column, and "
                f"{name} has strides {tuple(stack.stride())}"
            )
    if gate_EDF is not None and (gate_EDF.stride(2) == 1) != (up_EDF.stride(2) == 1):
        return "native needs gate and up in the same order in memory"
    return None


def grouped_ffn_native(
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

    Raises:
        BackendError: if the kernels are not compiled, or cannot take the weights.
        ShapeError: if tokens, plan and weights do not fit together.
    """
    if are_operations_watched():
        return grouped_ffn_torch(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)
    kernels = _ready(x_TD, plan, gate_EDF, up_EDF, down_EFD)
    inputs = (x_TD, plan.weight_N, gate_EDF, up_EDF, down_EFD)
    has_graph = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    if has_graph and x_TD.dtype in kernels.products:
        y_TD: Tensor = _GroupedFFN.apply(*inputs, plan, activation, kernels)  # type: ignore[no-untyped-call]
        return y_TD
    if not has_graph:
        work = _Work(kernels, x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)
        if work.few_rows():
            return work.y_TD
        if x_TD.dtype in kernels.products:
            return work.forward(None, None)
    return grouped_ffn_torch(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)


def _ready(x_TD: Tensor, plan: Plan, gate_EDF: Tensor | None, up_EDF: Tensor, down_EFD: Tensor) -> Compiled:
    """The kernels; C reads memory as it is told to, so what does not fit is refused here."""
    kernels = build.compiled()
    why_not = native_cannot(x_TD.device, x_TD.dtype) or native_misfits(gate_EDF, up_EDF, down_EFD)
    if kernels is None or why_not is not None:
        raise BackendError(f"the kernels in C must be able to run here, but {why_not}. Use kernel='auto'.")
    num_experts, width, hidden = up_EDF.shape
    given = [up_EDF, down_EFD] if gate_EDF is None else [gate_EDF, up_EDF, down_EFD]
    if any(one.dtype != x_TD.dtype or one.device != x_TD.device for one in given):
        raise ShapeError(
            f"tokens and weights must be of one dtype and device, got {x_TD.dtype} on {x_TD.device} and "
            f"{', '.join(f'{one.dtype} on {one.device}' for one in given)}. Convert the tokens, or the experts."
        )
    shapes = [tuple(one.shape) for one in given]
    if shapes != [(num_experts, width, hidden)] * (len(given) - 1) + [(num_experts, hidden, width)]:
        raise ShapeError(
            "gate and up must be (experts, width, hidden) and down (experts, hidden, width), got "
            f"{', '.join(map(str, shapes))}. Give the three weights of the same experts."
        )
    if x_TD.shape[1] != width or plan.num_experts != num_experts:
        raise ShapeError(
            f"tokens must be {width} wide and the plan for {num_experts} experts, got {x_TD.shape[1]} and "
            f"{plan.num_experts}. Build router and experts of the tokens' width, with the same num_experts."
        )
    return kernels


class _Work:
    """One call of C: the job, and what it points to, memory that must not go before."""

    def __init__(
        self,
        kernels: Compiled,
        x_TD: Tensor,
        plan: Plan,
        gate_EDF: Tensor | None,
        up_EDF: Tensor,
        down_EFD: Tensor,
        activation: Activation,
    ) -> None:
        self._kernels = kernels
        self._held: list[Tensor | None] = [gate_EDF, up_EDF, down_EFD]
        self._loads = plan.load_E
        num_experts, width, hidden = up_EDF.shape
        x_TD = x_TD.detach() if x_TD.stride(1) == 1 else x_TD.detach().contiguous()
        self.y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        self.job = Job(
            num_experts=num_experts,
            num_tokens=x_TD.shape[0],
            width=width,
            hidden=hidden,
            activation=ACTIVATIONS[activation.name],
            is_gated=gate_EDF is not None,
            num_threads=torch.get_num_threads(),
            is_bf16=x_TD.dtype == torch.bfloat16,
            x=self.hold(x_TD),
            x_row=x_TD.stride(0),
            token=self.hold(plan.token_N.to(torch.int64).contiguous()),
            end=self.hold(plan.offset_E.to(torch.int64).contiguous()),
            weight=self.hold(plan.weight_N.detach().to(torch.float32).contiguous()),
            gate=Stack.of(gate_EDF),
            up=Stack.of(up_EDF),
            down=Stack.of(down_EFD),
            y=self.y_TD.data_ptr(),
        )

    def hold(self, tensor: Tensor | None) -> int | None:
        """Its address, for as long as this is there."""
        self._held.append(tensor)
        return None if tensor is None else tensor.data_ptr()

    def few_rows(self) -> bool:
        """Fill the outputs if rows are few."""
        found = self._kernels.few_rows(ctypes.byref(self.job))
        if found == NO_MEMORY:
            raise MemoryError("generation needs memory for the hidden states of its rows, and there is none left.")
        return found == DONE

    def forward(self, gate_NF: Tensor | None, up_NF: Tensor | None) -> Tensor:
        """Outputs; pre-activations are written to ``gate_NF`` and ``up_NF`` where these are given."""
        self.job.gate_pre, self.job.up_pre = self.hold(gate_NF), self.hold(up_NF)
        self.run(self._loads.tolist(), is_forward=True)
        return self.y_TD

    def run(self, loads: Sequence[int], *, is_forward: bool) -> None:
        """Share the experts out and have them worked on."""
        job = self.job
        if sum(loads) * job.width * job.hidden < SMALL_LAYER:
            job.num_threads = 1
        live = [e for e, load in enumerate(loads) if load]
        together, apart = share_out([loads[e] for e in live], job.num_threads)
        job.order = self.hold(torch.tensor([live[i] for i in (*together, *apart)], dtype=torch.int64))
        job.num_order, job.num_together = len(live), len(together)
        cpu, needs_rows = torch.device("cpu"), is_forward or bool(job.wants_x)
        job.rows = self.hold(large_empty((sum(loads) if needs_rows else 0, job.width), self.y_TD.dtype, cpu))
        size = (self._kernels.scratch_bytes(ctypes.byref(job), is_forward),)
        job.scratch = self.hold(large_empty(size, torch.uint8, cpu))
        self._kernels.grouped(ctypes.byref(job), is_forward)


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        gate_EDF: Tensor | None,
        up_EDF: Tensor,
        down_EFD: Tensor,
        plan: Plan,
        activation: Activation,
        kernels: Compiled,
    ) -> Tensor:
        shape = (plan.token_N.shape[0], up_EDF.shape[-1])
        up_NF = large_empty(shape, x_TD.dtype, x_TD.device)
        gate_NF = None if gate_EDF is None else large_empty(shape, x_TD.dtype, x_TD.device)
        ctx.save_for_backward(x_TD, weight_N, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF)
        ctx.plan, ctx.activation, ctx.kernels = plan, activation, kernels
        return _Work(kernels, x_TD, plan, gate_EDF, up_EDF, down_EFD, activation).forward(gate_NF, up_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF = ctx.saved_tensors
        needs_x, _, *needs, _, _, _ = ctx.needs_input_grad
        stacks = (gate_EDF, up_EDF, down_EFD)
        gradients = gradients_like([one if needed else None for one, needed in zip(stacks, needs, strict=True)])
        work = _Work(ctx.kernels, x_TD, ctx.plan, *stacks, ctx.activation)
        job, grad_weight_N = work.job, torch.zeros(weight_N.shape, dtype=torch.float32)
        if grad_y_TD.stride(1) != 1:
            grad_y_TD = grad_y_TD.contiguous()
        job.gate_pre, job.up_pre = work.hold(gate_NF), work.hold(up_NF)
        job.grad_y, job.grad_y_row = work.hold(grad_y_TD), grad_y_TD.stride(0)
        job.grad_weight, job.wants_x = work.hold(grad_weight_N), needs_x
        job.grad_gate, job.grad_up, job.grad_down = map(Stack.of, gradients)
        work.run(ctx.plan.load_E.tolist(), is_forward=False)
        grad_x_TD = work.y_TD if needs_x else None
        return grad_x_TD, grad_weight_N.to(weight_N.dtype), *gradients, None, None, None
