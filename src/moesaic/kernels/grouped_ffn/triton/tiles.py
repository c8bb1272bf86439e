"""Ragged rows in square tiles: which expert's rows each tile holds, found on the device and never asked for.

Expert ``e`` with ``n`` rows takes ``ceil(n / BLOCK_M)`` tiles, so that E experts take at most ``N / BLOCK_M + E``. The
list of tiles has that length whatever the loads are; how much of it is used stands behind its end.
"""

import triton
import triton.language as tl


def most_tiles(num_rows: int, num_experts: int, block: int) -> int:
    """The most tiles of ``block`` rows that so many rows of so many experts can take."""
    return num_rows // block + num_experts


@triton.jit
def list_tiles_kernel(
    offset_ptr, tile_ptr, num_experts, most, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the expert, first row and end of each tile, and the number of tiles behind the three lists.

    Args:
        offset_ptr: where each expert's rows end, int64 (E,).
        tile_ptr: int32 (3 * most + 1,).
        num_experts: E.
        most: length of each list.
        BLOCK_M: rows of a tile.
        EXPERTS: E, rounded up to a power of 2.
        BLOCK: tiles that one program lists.
    """
    expert = tl.arange(0, EXPERTS)
    is_real = expert < num_experts
    end = tl.load(offset_ptr + expert, mask=is_real, other=0).to(tl.int32)
    start = tl.load(offset_ptr + expert - 1, mask=is_real & (expert > 0), other=0).to(tl.int32)
    last_tile = tl.cumsum(tl.where(is_real, (end - start + BLOCK_M - 1) // BLOCK_M, 0), axis=0)
    total = tl.max(last_tile, axis=0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The expert of a tile is the number of experts whose tiles all come before it.
    is_before = (last_tile[None, :] <= tile[:, None]) & is_real[None, :]
    mine = tl.sum(is_before.to(tl.int32), axis=1)
    tiles_before = tl.max(tl.where(is_before, last_tile[None, :], 0), axis=1)
    is_used = tile < total
    my_start = tl.load(offset_ptr + mine - 1, mask=is_used & (mine > 0), other=0).to(tl.int32)
    my_end = tl.load(offset_ptr + mine, mask=is_used, other=0).to(tl.int32)
    fits = tile < most
    tl.store(tile_ptr + tile, mine, mask=fits)
    tl.store(tile_ptr + most + tile, my_start + (tile - tiles_before) * BLOCK_M, mask=fits)
    tl.store(tile_ptr + 2 * most + tile, my_end, mask=fits)
    tl.store(tile_ptr + 3 * most, total, mask=tl.program_id(0) == 0)


@triton.jit
def tile_and_column(place, num_tiles, num_columns, GROUP: tl.constexpr):
    """The tile and the block of columns at a place of the work list.

    ``GROUP`` tiles, mostly of one expert, walk over the columns together: a weight that one has read is in the L2 cache
    for the others.
    """
    first = place // (GROUP * num_columns) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = place % (GROUP * num_columns)
    return first + within % size, within // size


@triton.jit
def tile_place(first, column, columns, BLOCK_M: tl.constexpr):
    """Where a tile's numbers stand in rows of ``columns``: its start, int64, and the way from there, int32.

    N rows of F columns may be more than 2^31 numbers, BLOCK_M rows of them are not: 64 bits for each number of a tile
    would fill the registers.
    """
    return first.to(tl.int64) * columns, tl.arange(0, BLOCK_M)[:, None] * columns + column[None, :]
