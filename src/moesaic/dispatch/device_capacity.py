"""Dispatch with a capacity for each device: the experts of one device share a budget of rows (DeepSeek-V2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing, missing_extra
from moesaic.dispatch.capacity import check_factors, rank_within
from moesaic.kernels.sort_rows import sort_kept


class DeviceCapacity(nn.Module):
    """In training, let each device work on at most ``ceil(factor * rows / devices)`` rows; in evaluation, on all.

    The rows of smallest weight go first, of equal ones those of the latest tokens. Where experts live is read from
    ``routing.extras["device_E"]``, which a router with groups stamps.

    Args:
        factor: room over perfectly balanced devices.
        never_dropped: share of sequences whose rows always stay, though they count against the budget. Of S sequences
            it is the nearest whole number to that share, evenly spread by index: of 0.1, sequences 4, 14, 24 and so on,
            counted from 0. The paper does not say how it picks them.
    Raises:
        ConfigError: if the factor is not positive, or ``never_dropped`` no share.

    Source: DeepSeek-V2, section 2.2.4, "Token-Dropping Strategy".
    """

    def __init__(self, factor: float = 1.0, *, never_dropped: float = 0.1) -> None:
        super().__init__()
        check_factors(factor=factor)
        if not 0 <= never_dropped <= 1:
            raise ConfigError(f"never_dropped must be between 0 and 1, got {never_dropped}. DeepSeek-V2 uses 0.1.")
        self.factor = factor
        self.never_dropped = never_dropped

    def capacity(self, routing: Routing) -> Tensor:
        """Rows that each device may take of this table in training, an int64 scalar."""
        num_devices = self._devices(routing).max() + 1
        share = routing.valid_N.sum().double() * self.factor / num_devices
        # As in Capacity: the last bit of a product must not buy a slot.
        return torch.ceil(share - 1e-6).to(torch.int64)

    def forward(self, routing: Routing) -> Plan:
        """Sort the rows that fit by expert; mark the others as dropped."""
        if not self.training:
            return sort_kept(routing, routing.valid_N)
        stays_N = self._stays(routing)[routing.token_N]
        # Stable sorts, least important key first: rows already stand in token order.
        by_weight_N = torch.argsort(routing.weight_N.detach(), descending=True, stable=True)
        priority_N = by_weight_N[torch.argsort((~stays_N)[by_weight_N].int(), stable=True)]
        device_N = self._devices(routing)[routing.expert_N]
        rank_N = rank_within(device_N, routing.num_experts, routing.valid_N, priority_N)
        return sort_kept(routing, routing.valid_N & (stays_N | (rank_N < self.capacity(routing))))

    def _devices(self, routing: Routing) -> Tensor:
        if "device_E" not in routing.extras:
            where = "a router with groups, such as TopKRouter(groups=GroupLimit(...))"
            raise missing_extra("device_E", "DeviceCapacity", where)
        return routing.extras["device_E"]

    def _stays(self, routing: Routing) -> Tensor:
        """True where a token's sequence is one of those that lose no row."""
        if routing.sequence_T is None:
            sequence_T = torch.zeros_like(routing.valid_T, dtype=torch.int64)
        else:
            sequence_T = routing.sequence_T
        # How many of the first s and of the first s + 1 sequences stay; 15 * 0.1 + 0.5 must not fall short of 2.
        before_T, after_T = (torch.floor((sequence_T + i).double() * self.never_dropped + 0.5 + 1e-9) for i in (0, 1))
        return after_T > before_T
