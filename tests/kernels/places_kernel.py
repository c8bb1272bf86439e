"""A kernel that writes down the work list; imported by tests once it is known that Triton is there."""

import triton
import triton.language as tl

from moesaic.kernels.grouped_ffn.triton.tiles import tile_and_column


@triton.jit
def write_places(out_ptr, num_tiles, num_columns, GROUP: tl.constexpr):
    """The tile and the column of each place, side by side."""
    place = tl.program_id(0)
    tile, column = tile_and_column(place, num_tiles, num_columns, GROUP)
    tl.store(out_ptr + 2 * place, tile)
    tl.store(out_ptr + 2 * place + 1, column)
