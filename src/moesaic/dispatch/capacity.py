"""Dispatch with a capacity: each expert takes a bounded number of rows, and the plan says which were dropped."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing
from moesaic.kernels.sort_rows import sort_kept


class Capacity(nn.Module):
    """Let each expert take at most ``C = max(minimum, ceil(factor * rows / E))`` rows, rows without padding.

    ``factor`` is relative to perfectly balanced rows, as in DeepSpeed and Megatron: 1.0 fits exactly if all experts
    get the same, whatever K. Switch, Mesh TensorFlow and ST-MoE leave K out: their factor is ours times K, or ours as
    it is with ``per="token"``.

    Args:
        factor: capacity factor in training.
        eval_factor: capacity factor in evaluation; None for the same as in training.
        minimum: least capacity, so that small batches lose nothing (4 in Mesh TensorFlow).
        drop: which rows of an overfull expert go: "position" keeps all first choices before second ones, and among
            those the earliest tokens (GShard Alg. 1); "score" keeps the rows of largest weight, then the earliest;
            "random" keeps any in training, drawing one uniform number for each token and expert in one call of shape
            (T, E) after those of the router, and the earliest in evaluation (DeepSpeed's random token selection).
        group: whose tokens compete for the same places: those of the whole "batch", of one "sequence", or of so many
            consecutive tokens, padding left out. Each group has a capacity of its own, counted from its rows (GShard,
            section 2.2).
        per: what the factor counts: "row" as above, or "token", ``C = ceil(factor * tokens / E)`` whatever K, which
            stays the same where a router leaves choices out at random.
    Raises:
        ConfigError: if a factor or group size is not positive, the minimum is negative, or a word is unknown.
    """

    def __init__(
        self,
        factor: float = 1.25,
        *,
        eval_factor: float | None = None,
        minimum: int = 4,
        drop: Literal["position", "score", "random"] = "position",
        group: Literal["batch", "sequence"] | int = "batch",
        per: Literal["row", "token"] = "row",
    ) -> None:
        super().__init__()
        check_factors(factor=factor, eval_factor=eval_factor)
        if minimum < 0:
            raise ConfigError(f"capacity minimum must be at least 0, got {minimum}. Mesh TensorFlow uses 4.")
        if drop not in ("position", "score", "random"):
            raise ConfigError(
                f"drop must be 'position', 'score' or 'random', got {drop!r}. Switch and GShard use 'position'."
            )
        if (isinstance(group, str) and group not in ("batch", "sequence")) or (isinstance(group, int) and group < 1):
            raise ConfigError(
                f"group must be 'batch', 'sequence' or a number of tokens, got {group!r}. "
                "Mesh TensorFlow uses groups of 1024."
            )
        if per not in ("row", "token"):
            raise ConfigError(f"per must be 'row' or 'token', got {per!r}. GShard and ST-MoE count by 'token'.")
        self.factor = factor
        self.eval_factor = factor if eval_factor is None else eval_factor
        self.minimum = minimum
        self.drop = drop
        self.group = group
        self.per = per

    def capacity(self, routing: Routing) -> Tensor:
        """Rows that each expert may take, an int64 scalar; of each group's rows, (G,), where there are groups."""
        group_T, num_groups = self._groups(routing)
        capacity_G = self._capacity(routing, group_T, num_groups)
        return capacity_G[0] if self.group == "batch" else capacity_G

    def forward(self, routing: Routing) -> Plan:
        """Sort the rows that fit by expert; mark the others as dropped."""
        group_T, num_groups = self._groups(routing)
        group_N = group_T[routing.token_N]
        # Experts of one group are to those of another as other experts: each has places of its own.
        queue_N = group_N * routing.num_experts + routing.expert_N
        rank_N = rank_within(queue_N, num_groups * routing.num_experts, routing.valid_N, self._priority(routing))
        room_N = self._capacity(routing, group_T, num_groups)[group_N]
        return sort_kept(routing, routing.valid_N & (rank_N < room_N))

    def _groups(self, routing: Routing) -> tuple[Tensor, int]:
        """The group of each token, from 0, and how many there are."""
        valid_T = routing.valid_T
        if isinstance(self.group, int):
            group_T = (valid_T.cumsum(0) - 1).clamp_min(0) // self.group
            return group_T, int(group_T[-1]) + 1 if len(group_T) else 1
        if self.group == "sequence" and routing.sequence_T is not None:
            names, group_T = torch.unique(routing.sequence_T, return_inverse=True)
            return group_T, max(1, len(names))
        return torch.zeros_like(valid_T, dtype=torch.int64), 1

    def _capacity(self, routing: Routing, group_T: Tensor, num_groups: int) -> Tensor:
        factor = self.factor if self.training else self.eval_factor
        counted_T = routing.valid_T.to(torch.int64)
        if self.per == "row":
            counted_T = torch.zeros_like(counted_T).index_add_(0, routing.token_N, routing.valid_N.to(torch.int64))
        counted_G = torch.zeros(num_groups, dtype=torch.int64, device=group_T.device)
        share_G = counted_G.index_add_(0, group_T, counted_T).double() * factor / routing.num_experts
        # 50 * 1.1 is 55.00000000000001: the last bit must not buy a slot.
        return torch.ceil(share_G - 1e-6).to(torch.int64).clamp_min(self.minimum)

    def _priority(self, routing: Routing) -> Tensor:
        """Row indices, first served first."""
        # Stable sorts, least important key first: rows already stand in token order.
        if self.drop == "score":
            return torch.argsort(routing.weight_N.detach(), descending=True, stable=True)
        if self.drop == "random" and self.training:
            weight_N = routing.weight_N
            drawn_TE = torch.rand(routing.scores_TE.shape, dtype=weight_N.dtype, device=weight_N.device)
            return torch.argsort(drawn_TE[routing.token_N, routing.expert_N], descending=True, stable=True)
        return torch.argsort(routing.choice_N, stable=True)


def rank_within(queue_N: Tensor, num_queues: int, valid_N: Tensor, priority_N: Tensor) -> Tensor:
    """How many valid rows of the same queue, of those for one expert or device, are served before each row.

    Args:
        queue_N: the queue of each row, from 0.
        num_queues: how many there are.
        valid_N: False for rows that wait in none.
        priority_N: row indices, first served first.
    """
    queue_N = torch.where(valid_N, queue_N, num_queues)[priority_N]
    by_queue_N = torch.argsort(queue_N, stable=True)
    count = torch.zeros(num_queues + 1, dtype=torch.int64, device=queue_N.device)
    count.index_add_(0, queue_N, torch.ones_like(queue_N))
    start = count.cumsum(0) - count
    place_N = torch.arange(queue_N.shape[0], device=queue_N.device)
    rank_N = torch.empty_like(queue_N)
    rank_N[priority_N[by_queue_N]] = place_N - start[queue_N[by_queue_N]]
    return rank_N


def check_factors(**factors: float | None) -> None:
    """Refuse a room for no row at all; None stands for no limit.

    Raises:
        ConfigError: if one is not positive.
    """
    for name, value in factors.items():
        if value is not None and value <= 0:
            raise ConfigError(
                f"capacity {name} must be positive, got {value}. Use dispatch.Sort() to drop nothing at all."
            )
