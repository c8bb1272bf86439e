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
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moesaic.core.errors import BackendError
from moesaic.core.living import Living
from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.layout import gradients_like
from moesaic.kernels.grouped_ffn.torch import SMALL_LAYER, grouped_ffn_torch
from moesaic.kernels.memory import large_empty
from moesaic.kernels.native.library import Job, Library, Stack, library
from moesaic.kernels.side_by_side import share_out

# As in activations.h.
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4}
_DONE, _NO_MEMORY = 0, 2


def native_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels in C cannot run somewhere, or None."""
    if device.type != "cpu":
        return "it is C for CPUs"
    if dtype not in (torch.float32, torch.bfloat16):
        return "it takes float32 and bfloat16"
    if library() is None:
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
    """
    if torch.compiler.is_compiling() or _are_operations_watched():
        return grouped_ffn_torch(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)
    inputs = (x_TD, plan.weight_N, gate_EDF, up_EDF, down_EFD)
    kernels = _ready(x_TD, gate_EDF, up_EDF, down_EFD)
    has_graph = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs)
    if not has_graph:
        y_TD = _few_rows(kernels, x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)
        if y_TD is not None:
            return y_TD
    if x_TD.dtype not in kernels.products:
        return grouped_ffn_torch(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)
    if has_graph:
        result: Tensor = _GroupedFFN.apply(*inputs, plan, activation)  # type: ignore[no-untyped-call]
        return result
    return _forward(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation, None, None)


def _are_operations_watched() -> bool:
    """Whether somebody counts or traces operations, and would see none of ours. What is alive, ours show as all do."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(not isinstance(mode, Living) for mode in _get_current_dispatch_mode_stack())


def _ready(x_TD: Tensor, gate_EDF: Tensor | None, up_EDF: Tensor, down_EFD: Tensor) -> Library:
    why_not = native_cannot(x_TD.device, x_TD.dtype) or native_misfits(gate_EDF, up_EDF, down_EFD)
    kernels = library()
    if kernels is None or why_not is not None:
        raise BackendError(f"the kernels in C must be able to run here, but {why_not}. Use kernel='auto'.")
    return kernels


class _Held:
    """A job, and what it points to: memory that must not go while C reads it."""

    def __init__(
        self,
        x_TD: Tensor,
        plan: Plan,
        gate_EDF: Tensor | None,
        up_EDF: Tensor,
        down_EFD: Tensor,
        activation: Activation,
    ) -> None:
        x_TD = x_TD.detach() if x_TD.stride(1) == 1 else x_TD.detach().contiguous()
        weight_N = plan.weight_N.detach().to(torch.float32).contiguous()
        num_experts, width, hidden = up_EDF.shape
        self.tensors = [x_TD, weight_N, plan, gate_EDF, up_EDF, down_EFD]
        self.job = Job(
            num_experts=num_experts,
            num_tokens=x_TD.shape[0],
            width=width,
            hidden=hidden,
            activation=_ACTIVATIONS[activation.name],
            is_gated=gate_EDF is not None,
            num_threads=torch.get_num_threads(),
            is_bf16=x_TD.dtype == torch.bfloat16,
            x=x_TD.data_ptr(),
            x_row=x_TD.stride(0),
            token=plan.token_N.data_ptr(),
            end=plan.offset_E.data_ptr(),
            weight=weight_N.data_ptr(),
            gate=Stack.of(gate_EDF),
            up=Stack.of(up_EDF),
            down=Stack.of(down_EFD),
        )

    def hold(self, tensor: Tensor) -> int:
        """Its address, for as long as this is held."""
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def run(self, kernels: Library, loads: Sequence[int], *, is_forward: bool) -> None:
        """Share the experts out and have them worked on."""
        job = self.job
        if sum(loads) * job.width * job.hidden < SMALL_LAYER:
            job.num_threads = 1
        live = [e for e, load in enumerate(loads) if load]
        together, apart = share_out([loads[e] for e in live], job.num_threads)
        job.order = self.hold(torch.tensor([live[i] for i in (*together, *apart)], dtype=torch.int64))
        job.num_order, job.num_together = len(live), len(together)
        pointer = ctypes.byref(job)
        size = (kernels.scratch_bytes(pointer, is_forward),)
        job.scratch = self.hold(large_empty(size, torch.uint8, torch.device("cpu")))
        kernels.grouped(pointer, is_forward)


def _few_rows(
    kernels: Library,
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
) -> Tensor | None:
    """The outputs, or None if rows are not few."""
    held = _Held(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    held.job.y = y_TD.data_ptr()
    found = kernels.few_rows(ctypes.byref(held.job))
    if found == _NO_MEMORY:
        raise MemoryError("generation needs memory for the hidden states of its rows, and there is none left.")
    return y_TD if found == _DONE else None


def _forward(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
    gate_NF: Tensor | None,
    up_NF: Tensor | None,
) -> Tensor:
    """Outputs; pre-activations are written to ``gate_NF`` and ``up_NF`` where these are given."""
    held = _Held(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)
    loads = plan.load_E.tolist()
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    rows_ND = large_empty((sum(loads), x_TD.shape[1]), x_TD.dtype, x_TD.device)
    held.job.y, held.job.rows = held.hold(y_TD), held.hold(rows_ND)
    if up_NF is not None:
        held.job.up_pre = held.hold(up_NF)
    if gate_NF is not None:
        held.job.gate_pre = held.hold(gate_NF)
    held.run(_ready(x_TD, gate_EDF, up_EDF, down_EFD), loads, is_forward=True)
    return y_TD


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
    ) -> Tensor:
        shape = (plan.token_N.shape[0], up_EDF.shape[-1])
        up_NF = large_empty(shape, x_TD.dtype, x_TD.device)
        gate_NF = None if gate_EDF is None else large_empty(shape, x_TD.dtype, x_TD.device)
        ctx.save_for_backward(x_TD, weight_N, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF)
        ctx.plan, ctx.activation = plan, activation
        return _forward(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation, gate_NF, up_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF = ctx.saved_tensors
        needs_x, _, needs_gate, needs_up, needs_down, _, _ = ctx.needs_input_grad
        plan: Plan = ctx.plan
        stacks = (gate_EDF, up_EDF, down_EFD)
        needed = zip(stacks, (needs_gate, needs_up, needs_down), strict=True)
        gradients = gradients_like([one if needs else None for one, needs in needed])
        held = _Held(x_TD, plan, *stacks, ctx.activation)
        job, loads = held.job, plan.load_E.tolist()
        if grad_y_TD.stride(1) != 1:
            grad_y_TD = grad_y_TD.contiguous()
        grad_x_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype) if needs_x else None
        grad_weight_N = torch.zeros(weight_N.shape, dtype=torch.float32)
        rows_ND = large_empty((sum(loads) if needs_x else 0, x_TD.shape[1]), x_TD.dtype, x_TD.device)
        job.up_pre, job.gate_pre = up_NF.data_ptr(), None if gate_NF is None else gate_NF.data_ptr()
        job.grad_y, job.grad_y_row = held.hold(grad_y_TD), grad_y_TD.stride(0)
        job.grad_weight, job.rows = held.hold(grad_weight_N), held.hold(rows_ND)
        job.grad_gate, job.grad_up, job.grad_down = map(Stack.of, gradients)
        job.wants_x, job.y = needs_x, None if grad_x_TD is None else held.hold(grad_x_TD)
        held.run(_ready(x_TD, *stacks), loads, is_forward=False)
        return grad_x_TD, grad_weight_N.to(weight_N.dtype), *gradients, None, None
