"""A capacity for experts of two kinds: more room where work is cheap (MoE++)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing, missing_extra
from moesaic.dispatch.capacity import check_factors
from moesaic.kernels.sort_rows import sort_kept


class HeterogeneousCapacity(nn.Module):
    """Share ``factor * rows`` places among the experts in proportion to ``1 / eta``, each share rounded up.

    ``eta`` is what a router of unlike experts stamps, 1 for feed-forward networks and tau for zero-computation
    experts: these then get ``1 / tau`` times as much room. The paper counts tokens where this counts rows: with K
    choices each, half of them could not fit at K=2. All first choices are served before second ones, and among those
    the earliest tokens.

    Args:
        factor: room over the rows, gamma in the paper.
        eval_factor: the same in evaluation; None drops nothing there, as the authors' inference code.
        minimum: least places of an expert.
    Raises:
        ConfigError: if a factor is not positive or the minimum is negative.

    Source: Jin et al. 2024, "MoE++", section 3.3.
    """

    def __init__(self, factor: float = 1.1, *, eval_factor: float | None = None, minimum: int = 0) -> None:
        super().__init__()
        check_factors(factor=factor, eval_factor=eval_factor)
        if minimum < 0:
            raise ConfigError(f"capacity minimum must be at least 0, got {minimum}. MoE++ names none: 0.")
        self.factor = factor
        self.eval_factor = eval_factor
        self.minimum = minimum

    def share_E(self, routing: Routing) -> Tensor:
        """Places of each expert before rounding up, float64 (E,): they add up to ``factor * rows``.

        Raises:
            ConfigError: if the routing has no ``extras["eta_E"]``.
        """
        if "eta_E" not in routing.extras:
            raise missing_extra("eta_E", "HeterogeneousCapacity", "routers.ResidualRouter")
        part_E = 1 / routing.extras["eta_E"].double()
        factor = self.factor if self.training or self.eval_factor is None else self.eval_factor
        return factor * routing.valid_N.sum().double() * part_E / part_E.sum()

    def capacity(self, routing: Routing) -> Tensor:
        """Rows that each expert may take of this table, int64 (E,)."""
        # 50 * 1.1 is 55.00000000000001: the last bit must not buy a slot.
        return torch.ceil(self.share_E(routing) - 1e-6).to(torch.int64).clamp_min(self.minimum)

    def forward(self, routing: Routing) -> Plan:
        """Sort the rows that fit by expert; mark the others as dropped."""
        if not self.training and self.eval_factor is None:
            return sort_kept(routing, routing.valid_N)
        room_N = self.capacity(routing)[routing.expert_N]
        return sort_kept(routing, routing.valid_N & (_rank(routing) < room_N))


def _rank(routing: Routing) -> Tensor:
    """How many valid rows of the same expert are served before each row."""
    queue_N = torch.where(routing.valid_N, routing.expert_N, routing.num_experts)
    # Stable sorts, least important key first: rows already stand in token order.
    order_N = torch.argsort(routing.choice_N, stable=True)
    order_N = order_N[torch.argsort(queue_N[order_N], stable=True)]
    place_N = torch.arange(len(order_N), device=order_N.device)
    start_N = torch.searchsorted(queue_N[order_N], queue_N[order_N])
    return torch.empty_like(order_N).scatter(0, order_N, place_N - start_N)
