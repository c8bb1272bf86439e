"""Rows times one expert's matrix, a tile at a time, with sums in float32."""

import triton
import triton.language as tl

from moesaic.kernels.grouped_ffn.triton import IS_INTERPRETED

# The interpreter's product takes the bits of a bfloat16 for a whole number.
_WIDENED = tl.constexpr(IS_INTERPRETED)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b``, in float32."""
    if _WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def add_product(
    sum_MN, a_ptr, row, is_row, b_ptr, b_inner, b_column, column, is_column, inner,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile's product to a sum.

    Args:
        sum_MN: float32.
        a_ptr: rows of ``inner`` numbers each, one after the other.
        row: which of them, int64.
        is_row: False where the tile has none.
        b_ptr: the expert's matrix.
        b_inner: its step to the next of the ``inner`` numbers, int64.
        b_column: its step to the next column, int64.
        column: which columns.
        is_column: False beyond the last one.
        inner: numbers that are multiplied and added up.
        BLOCK_K: how many of them at once.
        EVEN_K: they come in whole blocks.
        PRECISION: "ieee", or "tf32" for float32 that may be rounded.
    """
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row[:, None] * inner + k[None, :]
    b_ptrs = b_ptr + k.to(tl.int64)[:, None] * b_inner + column.to(tl.int64)[None, :] * b_column
    for start in range(0, inner, BLOCK_K):
        a_mask, b_mask = is_row[:, None], is_column[None, :]
        if not EVEN_K:
            is_inner = k < inner - start
            a_mask, b_mask = a_mask & is_inner[None, :], b_mask & is_inner[:, None]
        a = tl.load(a_ptrs, mask=a_mask, other=0.0)
        b = tl.load(b_ptrs, mask=b_mask, other=0.0)
        sum_MN = dot(a, b, sum_MN, PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * b_inner
    return sum_MN


@triton.jit
def add_two_products(
    first_MN, second_MN, a_ptr, row, is_row, b_ptr, b_inner, b_column, second_ptr, second_inner, second_column,
    column, is_column, inner, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile's products with two matrices to two sums, reading its rows once; see ``add_product``."""
    k = tl.arange(0, BLOCK_K)
    inner_k, across = k.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    a_ptrs = a_ptr + row[:, None] * inner + k[None, :]
    b_ptrs = b_ptr + inner_k * b_inner + across * b_column
    second_ptrs = second_ptr + inner_k * second_inner + across * second_column
    for start in range(0, inner, BLOCK_K):
        a_mask, b_mask = is_row[:, None], is_column[None, :]
        if not EVEN_K:
            is_inner = k < inner - start
            a_mask, b_mask = a_mask & is_inner[None, :], b_mask & is_inner[:, None]
        a = tl.load(a_ptrs, mask=a_mask, other=0.0)
        first_MN = dot(a, tl.load(b_ptrs, mask=b_mask, other=0.0), first_MN, PRECISION)
        second_MN = dot(a, tl.load(second_ptrs, mask=b_mask, other=0.0), second_MN, PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * b_inner
        second_ptrs += BLOCK_K * second_inner
    return first_MN, second_MN
