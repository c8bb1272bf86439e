"""The products of the forward, gate and up with the gather and the activation in them, and the sum for each token.

Programs stay for the whole launch and take every so many-th place of the work list, whose length they read from the
device.
"""

import triton
import triton.language as tl

from moesaic.kernels.grouped_ffn.triton.activations import hidden_of
from moesaic.kernels.grouped_ffn.triton.product import add_product, add_two_products
from moesaic.kernels.grouped_ffn.triton.tiles import tile_and_column, tile_place


@triton.jit
def hidden_kernel(
    x_ptr, token_ptr, gate_ptr, up_ptr, gate_out_ptr, up_out_ptr, hidden_ptr, tile_ptr, most, inner, columns,
    gate_expert, gate_inner, gate_column, up_expert, up_inner, up_column,
    NAME: tl.constexpr, GATED: tl.constexpr, SAVED: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``act(x gate) * (x up)`` of each row: x is read once for both products, by its token, and never copied.

    Args:
        x_ptr: tokens of ``inner`` numbers.
        token_ptr: the token of each row.
        gate_ptr, up_ptr: matrices, with their steps to the next expert, inner number and column.
        gate_out_ptr, up_out_ptr: pre-activations, (N, columns), which a backward needs; written if SAVED.
        hidden_ptr: the hidden rows, (N, columns).
        tile_ptr: what ``list_tiles_kernel`` wrote.
        most: length of its lists.
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
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        gate = up
        if GATED:
            gate, up = add_two_products(
                gate, up, x_ptr, token, is_row, gate_ptr + expert * gate_expert, gate_inner, gate_column,
                up_ptr + expert * up_expert, up_inner, up_column, column, is_column, inner,
                BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
        else:
            up = add_product(
                up, x_ptr, token, is_row, up_ptr + expert * up_expert, up_inner, up_column, column, is_column, inner,
                BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
        start, here = tile_place(first, column, columns, BLOCK_M)
        is_out = is_row[:, None] & is_column[None, :]
        # The backward sees pre-activations as they were rounded: so does the forward.
        dtype = hidden_ptr.dtype.element_ty
        gate, up = gate.to(dtype), up.to(dtype)
        if SAVED:
            if GATED:
                tl.store(gate_out_ptr + start + here, gate, mask=is_out)
            tl.store(up_out_ptr + start + here, up, mask=is_out)
        hidden = hidden_of(gate.to(tl.float32), up.to(tl.float32), NAME, GATED)
        tl.store(hidden_ptr + start + here, hidden.to(dtype), mask=is_out)


@triton.jit
def rows_kernel(
    a_ptr, b_ptr, second_a_ptr, second_b_ptr, out_ptr, tile_ptr, most, inner, columns,
    b_expert, b_inner, b_column, second_expert, second_inner, second_column,
    SECOND: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``a b`` of each row, or ``a b + second_a second_b``: outputs in the forward, inputs' gradients in the backward.

    Each row is written where it stands, so that no two programs add to one number; ``total_kernel`` adds a token's up.

    Args:
        a_ptr, second_a_ptr: (N, inner).
        b_ptr, second_b_ptr: matrices, with their steps to the next expert, inner number and column.
        out_ptr: (N, columns).
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
        out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        out = add_product(
            out, a_ptr, row.to(tl.int64), is_row, b_ptr + expert * b_expert, b_inner, b_column, column, is_column,
            inner, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
        if SECOND:
            out = add_product(
                out, second_a_ptr, row.to(tl.int64), is_row, second_b_ptr + expert * second_expert, second_inner,
                second_column, column, is_column, inner, BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
        start, here = tile_place(first, column, columns, BLOCK_M)
        tl.store(out_ptr + start + here, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def total_kernel(
    rows_ptr, place_ptr, bounds_ptr, weight_ptr, out_ptr, width, WEIGHED: tl.constexpr, BLOCK: tl.constexpr
):
    """Each token's sum of its rows, weighed in float32, in the order of experts; zeros for a token without any.

    Args:
        rows_ptr: (N, width).
        place_ptr: the places of the first token, of the second and so on.
        bounds_ptr: where each token's begin in that list, and the end of the last one's.
        weight_ptr: weight of each row, which is rounded no more than the sum is; read if WEIGHED.
        out_ptr: (T, width).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(tl.load(bounds_ptr + token), tl.load(bounds_ptr + token + 1)):
        place = tl.load(place_ptr + i).to(tl.int64)
        row = tl.load(rows_ptr + place * width + column, mask=is_column, other=0.0).to(tl.float32)
        if WEIGHED:
            row *= tl.load(weight_ptr + place).to(tl.float32)
        total += row
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=is_column)
