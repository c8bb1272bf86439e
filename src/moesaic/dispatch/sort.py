"""Dropless dispatch: sort the rows by expert and let every expert take all of its rows."""

from torch import nn

from moesaic.core.plan import Plan
from moesaic.core.routing import Routing
from moesaic.kernels.sort_rows import sort_kept


class Sort(nn.Module):
    """Keep every valid row, however many one expert gets (MegaBlocks, Gale et al. 2022)."""

    def forward(self, routing: Routing) -> Plan:
        """Sort the table's valid rows by expert."""
        return sort_kept(routing, routing.valid_N)
