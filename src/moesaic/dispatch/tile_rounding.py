"""Dispatch in whole tiles: in training, rows that would leave a tile of a GPU's kernel nearly empty are dropped."""

from __future__ import annotations

import torch
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing
from moesaic.dispatch.capacity import rank_within
from moesaic.kernels.sort_rows import sort_kept


class TileRounding(nn.Module):
    """Drop, in training, an expert's rows beyond its last whole tile where they fill less than a part of the next.

    Kernels work on tiles of so many rows of one expert, and a tile with few costs as much as a full one. An expert
    with ``n`` rows keeps ``n - n % tile`` of them where ``n % tile`` is below ``least_filled * tile``, those of largest
    weight, then the earliest; and all of them otherwise. Its first tile is never taken away, so that an expert with few
    rows loses none. Evaluation drops nothing. Nothing is asked of the device.

    SonicMoE (Guo et al. 2025) rounds to the nearest tile too, and where it rounds up gives the expert more tokens. Here
    no row is added: a plan holds rows of the router's table and no others, which losses and telemetry count.

    Args:
        tile: rows of a tile; 128 for most kernels.
        least_filled: part of a tile, from 0 to 1, below which its rows are dropped. 0 drops nothing, 0.5 at most half a
            tile of each expert, 1 all but whole tiles.
    Raises:
        ConfigError: if ``tile`` is below 1, or ``least_filled`` outside 0 to 1.
    """

    def __init__(self, tile: int = 128, *, least_filled: float = 0.5) -> None:
        super().__init__()
        if tile < 1:
            raise ConfigError(f"tile must be at least 1 row, got {tile}. Most kernels work on 128.")
        if not 0 <= least_filled <= 1:
            raise ConfigError(
                f"least_filled must be from 0 to 1, got {least_filled}. 0.5 rounds to the nearest tile, downwards only."
            )
        self.tile = tile
        self.least_filled = least_filled

    def forward(self, routing: Routing) -> Plan:
        """Sort the table's valid rows by expert, in training without those that leave a tile nearly empty."""
        valid_N = routing.valid_N
        if not self.training:
            return sort_kept(routing, valid_N)
        load_E = routing.load_E
        over_E = load_E % self.tile
        room_E = torch.where(over_E < self.least_filled * self.tile, load_E - over_E, load_E).clamp_min(self.tile)
        heaviest_N = torch.argsort(routing.weight_N.detach(), descending=True, stable=True)
        rank_N = rank_within(routing.expert_N, routing.num_experts, valid_N, heaviest_N)
        return sort_kept(routing, valid_N & (rank_N < room_E[routing.expert_N]))
