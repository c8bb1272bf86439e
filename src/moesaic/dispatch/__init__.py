"""Dispatch: from the routing table to the order in which experts work, and to what is dropped."""

from moesaic.dispatch.capacity import Capacity
from moesaic.dispatch.sort import Sort

__all__ = ["Capacity", "Sort"]
