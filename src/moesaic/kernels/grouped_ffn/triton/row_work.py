"""The work between products in one pass over memory each, for kernels whose products are not ours."""

import triton
import triton.language as tl

from moesaic.kernels.grouped_ffn.triton.activations import gradients_of, hidden_of


@triton.jit
def activated_kernel(
    gate_ptr, up_ptr, out_ptr, num_rows, columns,
    NAME: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The hidden rows of pre-activations (N, columns)."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < num_rows
    here = row[:, None] * columns + column[None, :]
    is_here = is_row[:, None] & (column < columns)[None, :]
    up = tl.load(up_ptr + here, mask=is_here, other=0.0).to(tl.float32)
    gate = up
    if GATED:
        gate = tl.load(gate_ptr + here, mask=is_here, other=0.0).to(tl.float32)
    out = hidden_of(gate, up, NAME, GATED)
    tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=is_here)


@triton.jit
def gradients_kernel(
    grad_ptr, gate_ptr, up_ptr, weight_ptr, grad_gate_ptr, grad_up_ptr, weighed_ptr, grad_weight_ptr, num_rows, columns,
    NAME: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the gradient of the unweighed hidden rows turns into, all of a row's columns in one program.

    Args:
        grad_ptr: gradient of the hidden rows, (N, columns), as are pre-activations, their gradients and ``weighed``.
        weight_ptr: weight of each row.
        grad_weight_ptr: its gradient, float32 (N,).
    """
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    is_row = row < num_rows
    weight = tl.load(weight_ptr + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dtype = weighed_ptr.dtype.element_ty
    for start in range(0, columns, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        here = row[:, None] * columns + column[None, :]
        is_here = is_row[:, None] & (column < columns)[None, :]
        grad = tl.load(grad_ptr + here, mask=is_here, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + here, mask=is_here, other=0.0).to(tl.float32)
        gate = up
        if GATED:
            gate = tl.load(gate_ptr + here, mask=is_here, other=0.0).to(tl.float32)
        hidden = hidden_of(gate, up, NAME, GATED)
        total += grad * hidden
        grad_gate, grad_up = gradients_of(grad * weight, gate, up, NAME, GATED)
        tl.store(weighed_ptr + here, (hidden * weight).to(dtype), mask=is_here)
        tl.store(grad_up_ptr + here, grad_up.to(dtype), mask=is_here)
        if GATED:
            tl.store(grad_gate_ptr + here, grad_gate.to(dtype), mask=is_here)
    tl.store(grad_weight_ptr + row, tl.sum(total, axis=1), mask=is_row)
