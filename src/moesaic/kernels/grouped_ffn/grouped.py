"""The grouped feed-forward by ``torch.nn.functional.grouped_mm``: no loop over experts, no question to the device.

Where each expert's rows end stays on the device. Shapes depend on the batch's shape alone, so a CUDA graph can hold the
whole and ``torch.compile`` sees one graph. Rows that reach no expert wait behind the last one's: grouped_mm leaves
their places as scratch memory had them, and nothing here reads such a place into a sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.core.errors import BackendError
from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.by_token import TokenRows, live
from moesaic.kernels.grouped_ffn.row_work import IN_PYTORCH, RowWork
from moesaic.kernels.grouped_ffn.triton import HAS_TRITON, row_work_in_triton

_MAX_EXPERTS = 1024  # one thread of a block prepares each product (GroupMM.cu)
_ALIGNMENT = 16  # bytes, of every row and matrix


def grouped_ffn_grouped_mm(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
) -> Tensor:
    """Run each expert over its rows and add the weighted outputs up.

    Takes and gives what :func:`~moesaic.kernels.grouped_ffn.reference.grouped_ffn_reference` does; not twice
    differentiable. On CUDA the work between the products is fused in Triton where Triton is there, as it is with
    PyTorch's builds for Linux.

    Raises:
        BackendError: if rows or matrices are not aligned as grouped_mm needs it.
    """
    why_not = grouped_mm_misfits(gate_EDF, up_EDF, down_EFD)
    if why_not is not None:
        raise BackendError(f"kernel 'grouped_mm' must be able to take these weights, but {why_not}. Use kernel='auto'.")
    token_rows = TokenRows.of(plan, x_TD.shape[0])
    work = row_work_in_triton() if HAS_TRITON and x_TD.device.type == "cuda" else IN_PYTORCH
    y_TD: Tensor = _GroupedMM.apply(  # type: ignore[no-untyped-call]
        x_TD,
        plan.weight_N,
        plan.token_N,
        plan.offset_E.to(torch.int32),
        token_rows.place_N,
        token_rows.bounds,
        gate_EDF,
        up_EDF,
        down_EFD,
        activation,
        work,
    )
    return y_TD


def grouped_mm_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why grouped_mm cannot run on a device in a dtype, or None if it can."""
    if device.type == "cpu":
        if dtype in (torch.float32, torch.bfloat16, torch.float16):
            return None
        return "grouped_mm multiplies float32, bfloat16 and float16"
    if device.type != "cuda":
        return "it is checked on CUDA and on CPUs"
    if torch.version.hip is not None:
        return "grouped_mm on ROCm waits for the device at each product"
    if dtype != torch.bfloat16:
        return "grouped_mm in another dtype than bfloat16 waits for the device at each product"
    major = torch.cuda.get_device_properties(device).major
    if major not in (9, 10):
        return f"grouped_mm waits for the device at each product on compute capability {major}; it has 9 and 10"
    return None


def grouped_mm_misfits(gate_EDF: Tensor | None, up_EDF: Tensor, down_EFD: Tensor) -> str | None:
    """Why grouped_mm cannot take some weights, or None if it can."""
    num_experts, width, hidden = up_EDF.shape
    size = up_EDF.element_size()
    if num_experts > _MAX_EXPERTS:
        return f"grouped_mm takes {_MAX_EXPERTS} experts at most and there are {num_experts}"
    for numbers in (width, hidden):
        if numbers * size % _ALIGNMENT:
            return (
                f"grouped_mm needs rows of a multiple of {_ALIGNMENT} bytes and {numbers} numbers of "
                f"{size} bytes are {numbers * size}"
            )
    for name, weight in (("gate", gate_EDF), ("up", up_EDF), ("down", down_EFD)):
        if weight is not None and not _is_aligned(weight):
            return (
                f"grouped_mm needs each expert's matrix row by row or column by column, on a multiple of {_ALIGNMENT} "
                f"bytes, and {name} has strides {tuple(weight.stride())}"
            )
    return None


def _is_aligned(weight: Tensor) -> bool:
    _, rows, columns = weight.shape
    of_expert, of_row, of_column = weight.stride()
    is_by_row = of_column == 1 and of_row >= columns
    is_by_column = of_row == 1 and of_column >= rows
    steps = (of_expert, of_column if is_by_column else of_row)
    return (is_by_row or is_by_column) and all(step * weight.element_size() % _ALIGNMENT == 0 for step in steps)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_N: Tensor,
        token_N: Tensor,
        offset_E: Tensor,
        place_N: Tensor,
        bounds: Tensor,
        gate_EDF: Tensor | None,
        up_EDF: Tensor,
        down_EFD: Tensor,
        activation: Activation,
        work: RowWork,
    ) -> Tensor:
        ctx.activation, ctx.work = activation, work
        gate_NF: Tensor | None = None
        if token_N.shape[0] == 0:  # grouped_mm refuses an operand without numbers on CUDA
            up_NF = x_TD.new_empty(0, up_EDF.shape[2])
            y_TD = torch.zeros_like(x_TD)
        else:
            x_ND = x_TD.index_select(0, token_N)
            up_NF = F.grouped_mm(x_ND, up_EDF, offs=offset_E)
            if gate_EDF is not None:
                gate_NF = F.grouped_mm(x_ND, gate_EDF, offs=offset_E)
            y_ND = F.grouped_mm(work.hidden(gate_NF, up_NF, activation), down_EFD, offs=offset_E)
            y_TD = work.total(y_ND, TokenRows(place_N=place_N, bounds=bounds), weight_N).to(x_TD.dtype)
        ctx.save_for_backward(
            x_TD, weight_N, token_N, offset_E, place_N, bounds, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF
        )
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_N, token_N, offset_E, place_N, bounds, gate_EDF, up_EDF, down_EFD, gate_NF, up_NF = (
            ctx.saved_tensors
        )
        needs_x, _, _, _, _, _, needs_gate, needs_up, needs_down, _, _ = ctx.needs_input_grad
        work: RowWork = ctx.work
        if token_N.shape[0] == 0:
            inputs = (x_TD, weight_N, None, None, None, None, gate_EDF, up_EDF, down_EFD)
            return (*(None if one is None else torch.zeros_like(one) for one in inputs), None, None)
        grad_y_ND = grad_y_TD.index_select(0, token_N)
        grad_NF = F.grouped_mm(grad_y_ND, down_EFD.transpose(1, 2), offs=offset_E)
        grads = work.gradients(grad_NF, weight_N, gate_NF, up_NF, ctx.activation)
        grad_weight_N = torch.where(live(offset_E, len(token_N)), grads.weight_N, 0).to(weight_N.dtype)
        grad_down_EFD = _of_weights(grads.weighed_NF, grad_y_ND, offset_E) if needs_down else None
        x_ND = x_TD.index_select(0, token_N)
        grad_up_EDF = _of_weights(x_ND, grads.up_NF, offset_E) if needs_up else None
        grad_gate_EDF: Tensor | None = None
        if needs_gate and grads.gate_NF is not None:
            grad_gate_EDF = _of_weights(x_ND, grads.gate_NF, offset_E)
        grad_x_TD: Tensor | None = None
        if needs_x:
            grad_x_ND = F.grouped_mm(grads.up_NF, up_EDF.transpose(1, 2), offs=offset_E)
            if grads.gate_NF is not None:
                grad_x_ND = grad_x_ND + F.grouped_mm(grads.gate_NF, gate_EDF.transpose(1, 2), offs=offset_E)
            grad_x_TD = work.total(grad_x_ND, TokenRows(place_N=place_N, bounds=bounds), None).to(x_TD.dtype)
        return grad_x_TD, grad_weight_N, None, None, None, None, grad_gate_EDF, grad_up_EDF, grad_down_EFD, None, None


def _of_weights(in_ND: Tensor, grad_NF: Tensor, offset_E: Tensor) -> Tensor:
    """Each expert's ``in^T grad`` over its own rows."""
    grad_EDF = F.grouped_mm(in_ND.t(), grad_NF, offs=offset_E)
    if in_ND.device.type == "cuda" and torch.cuda.get_device_properties(in_ND.device).major != 9:
        # An expert without rows gets scratch memory for a gradient on compute capability 10 (pytorch issue 172439).
        load_E = offset_E.diff(prepend=offset_E.new_zeros(1))
        grad_EDF = grad_EDF.masked_fill_((load_E == 0)[:, None, None], 0)
    return grad_EDF
