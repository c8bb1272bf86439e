"""The backward of the hidden rows, with the activation's derivative and the gradient of the weights in it."""

import triton
import triton.language as tl

from moesaic.kernels.grouped_ffn.triton.activations import gradients_of, hidden_of
from moesaic.kernels.grouped_ffn.triton.product import add_product, dot
from moesaic.kernels.grouped_ffn.triton.tiles import tile_and_column, tile_place


@triton.jit
def hidden_gradient_kernel(
    grad_y_ptr, token_ptr, down_ptr, weight_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, weighed_ptr, part_ptr,
    tile_ptr, most, inner, columns, num_parts, down_expert, down_inner, down_column,
    NAME: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``grad = dy down^T`` of each row, and in the same pass all that it turns into.

    ``<dy, hidden down> = <dy down^T, hidden>``: the weight's gradient needs no outputs of experts.

    Args:
        grad_y_ptr: gradient of the outputs, tokens of ``inner`` numbers.
        token_ptr: the token of each row.
        down_ptr: matrices, with their steps to the next expert, inner number (D) and column (F).
        weight_ptr: weight of each row.
        gate_ptr, up_ptr: pre-activations, (N, columns).
        grad_gate_ptr, grad_up_ptr: their gradients.
        weighed_ptr: the hidden rows times their weights, (N, columns), which down's gradient is made of.
        part_ptr: float32 (N, num_parts), the gradient of each row's weight from every PART columns, to be added up.
    """
    num_tiles = tl.load(tile_ptr + 3 * most)
    num_columns = tl.cdiv(columns, BLOCK_N)
    for place in range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        tile, block = tile_and_column(place, num_tiles, num_columns, GROUP)
        expert = tl.load(tile_ptr + tile).to(tl.int64)
        first = tl.load(tile_ptr + most + tile)
        row = first + tl.arange(0, BLOCK_M)
        is_row = row < tl.load(tile_ptr + 2 * most + tile)
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        is_column = column < columns
        token = tl.load(token_ptr + row, mask=is_row, other=0).to(tl.int64)
        grad = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        grad = add_product(
            grad, grad_y_ptr, token, is_row, down_ptr + expert * down_expert, down_inner, down_column, column,
            is_column, inner, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
        # A quarter of the columns at a time: all that the gradient turns into, at once, would not fit in the registers.
        first_and_third, second_and_fourth = tl.split(
            tl.reshape(grad, (BLOCK_M, 2, 2, BLOCK_N // 4)).permute(0, 3, 1, 2)
        )
        grad_0, grad_2 = tl.split(first_and_third)
        grad_1, grad_3 = tl.split(second_and_fourth)
        quarters = (grad_0, grad_1, grad_2, grad_3)
        weight = tl.load(weight_ptr + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
        part = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for i in tl.static_range(4):
            part += _finish(
                quarters[i], weight, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, weighed_ptr, first, is_row,
                block * BLOCK_N + i * (BLOCK_N // 4), columns, NAME, GATED, BLOCK_M, BLOCK_N // 4,
            )  # fmt: skip
        # What BLOCK_N is, is tuned: a part that it leaves over gets a zero.
        for i in tl.static_range(BLOCK_N // PART):
            which = block * (BLOCK_N // PART) + i
            tl.store(part_ptr + row.to(tl.int64) * num_parts + which, part, mask=is_row & (which < num_parts))
            part = tl.zeros_like(part)


@triton.jit
def _finish(
    grad, weight, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, weighed_ptr, first, is_row, first_column, columns,
    NAME: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = first_column + tl.arange(0, BLOCK)
    start, here = tile_place(first, column, columns, BLOCK_M)
    is_here = is_row[:, None] & (column < columns)[None, :]
    up = tl.load(up_ptr + start + here, mask=is_here, other=0.0).to(tl.float32)
    gate = up
    if GATED:
        gate = tl.load(gate_ptr + start + here, mask=is_here, other=0.0).to(tl.float32)
    hidden = hidden_of(gate, up, NAME, GATED)
    # Masked columns hold zeros.
    part = tl.sum(grad * hidden, axis=1)
    grad_gate, grad_up = gradients_of(grad * weight, gate, up, NAME, GATED)
    dtype = weighed_ptr.dtype.element_ty
    tl.store(weighed_ptr + start + here, (hidden * weight).to(dtype), mask=is_here)
    tl.store(grad_up_ptr + start + here, grad_up.to(dtype), mask=is_here)
    if GATED:
        tl.store(grad_gate_ptr + start + here, grad_gate.to(dtype), mask=is_here)
    return part


@triton.jit
def weight_gradient_kernel(
    in_ptr, grad_ptr, second_grad_ptr, token_ptr, offset_ptr, out_ptr, second_out_ptr, width, columns,
    out_expert, out_row, out_column, second_expert, second_row, second_column,
    IN_BY_TOKEN: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``in^T grad`` of each expert over its own rows; zeros for an expert without any.

    A program for each block of each expert's matrix, without a work list: experts differ in rows, and the device hands
    out programs as others end.

    Args:
        in_ptr: (T, width) if IN_BY_TOKEN, else (N, width).
        grad_ptr, second_grad_ptr: (N, columns) if IN_BY_TOKEN, else (T, columns); the second is read if SECOND.
        token_ptr: the token of each row.
        offset_ptr: where each expert's rows end.
        out_ptr, second_out_ptr: (E, width, columns), with their steps.
        BLOCK_M, BLOCK_N: block of a matrix.
        BLOCK_K: rows at once.
    """
    across = tl.cdiv(columns, BLOCK_N)
    blocks = tl.cdiv(width, BLOCK_M) * across
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start = tl.load(offset_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offset_ptr + expert)
    expert = expert.to(tl.int64)
    line = (block // across * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (block % across * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    is_line, is_column = line < width, column < columns
    out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = out
    for first in range(start, end, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        is_row = row < end
        token = tl.load(token_ptr + row, mask=is_row, other=0).to(tl.int64)
        if IN_BY_TOKEN:
            in_row, grad_row = token, row
        else:
            in_row, grad_row = row, token
        in_ptrs = in_ptr + in_row[None, :] * width + line[:, None]
        grad_here = grad_row[:, None] * columns + column[None, :]
        is_grad = is_row[:, None] & is_column[None, :]
        inputs = tl.load(in_ptrs, mask=is_line[:, None] & is_row[None, :], other=0.0)
        grad = tl.load(grad_ptr + grad_here, mask=is_grad, other=0.0)
        out = dot(inputs, grad, out, PRECISION)
        if SECOND:
            second_grad = tl.load(second_grad_ptr + grad_here, mask=is_grad, other=0.0)
            second = dot(inputs, second_grad, second, PRECISION)
    is_out = is_line[:, None] & is_column[None, :]
    out_ptrs = out_ptr + expert * out_expert + line[:, None] * out_row + column[None, :] * out_column
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=is_out)
    if SECOND:
        out_ptrs = (
            second_out_ptr + expert * second_expert + line[:, None] * second_row + column[None, :] * second_column
        )
        tl.store(out_ptrs, second.to(second_out_ptr.dtype.element_ty), mask=is_out)
