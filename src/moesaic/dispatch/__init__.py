"""Dispatch: from the routing table to the order in which experts work, and to what is dropped."""

from moesaic.dispatch.capacity import Capacity
from moesaic.dispatch.device_capacity import DeviceCapacity
from moesaic.dispatch.heterogeneous import HeterogeneousCapacity
from moesaic.dispatch.sort import Sort
from moesaic.dispatch.tile_rounding import TileRounding

__all__ = [
    "Capacity",
    "DeviceCapacity",
    "HeterogeneousCapacity",
    "Sort",
    "TileRounding",
]
