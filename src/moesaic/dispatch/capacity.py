"""Dispatch with a capacity: each expert takes a bounded number of rows, and the plan says which were dropped."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing


class Capacity(nn.Module):
    """Let each expert take at most ``C = max(minimum, ceil(factor * rows / E))`` rows, rows without padding.

    ``factor`` is relative to perfectly balanced rows, as in DeepSpeed and Megatron: 1.0 fits exactly if all experts
    get the same, whatever K. Switch, Mesh TensorFlow and ST-MoE leave K out: their factor is ours times K.

    Args:
        factor: capacity factor in training.
        eval_factor: capacity factor in evaluation; None for the same as in training.
        minimum: least capacity, so that small batches lose nothing (4 in Mesh TensorFlow).
        drop: which rows of an overfull expert go: "position" keeps all first choices before second ones, and among
            those the earliest tokens (GShard Alg. 1); "score" keeps the rows of largest weight, then the earliest.
    Raises:
        ConfigError: if a factor is not positive or the minimum is negative.
    """

    def __init__(
        self,
        factor: float = 1.25,
        *,
        eval_factor: float | None = None,
        minimum: int = 4,
        drop: Literal["position", "score"] = "position",
    ) -> None:
        super().__init__()
        for name, value in (("factor", factor), ("eval_factor", eval_factor)):
            if value is not None and value <= 0:
                raise ConfigError(
                    f"capacity {name} must be positive, got {value}. Use dispatch.Sort() to drop nothing at all."
                )
        if minimum < 0:
            raise ConfigError(f"capacity minimum must be at least 0, got {minimum}. Mesh TensorFlow uses 4.")
        if drop not in ("position", "score"):
            raise ConfigError(f"drop must be 'position' or 'score', got {drop!r}. Switch and GShard use 'position'.")
        self.factor = factor
        self.eval_factor = factor if eval_factor is None else eval_factor
        self.minimum = minimum
        self.drop = drop

    def capacity(self, routing: Routing) -> Tensor:
        """Rows that each expert may take of this table, an int64 scalar."""
        factor = self.factor if self.training else self.eval_factor
        share = routing.valid_N.sum().double() * factor / routing.num_experts
        # 50 * 1.1 is 55.00000000000001: the last bit must not buy a slot.
        return torch.ceil(share - 1e-6).to(torch.int64).clamp_min(self.minimum)

    def forward(self, routing: Routing) -> Plan:
        """Sort the rows that fit by expert; mark the others as dropped."""
        rank_N = _rank_within_expert(routing, self._priority(routing))
        return Plan.from_kept(routing, routing.valid_N & (rank_N < self.capacity(routing)))

    def _priority(self, routing: Routing) -> Tensor:
        """Row indices, first served first."""
        # Stable sorts, least important key first: rows already stand in token order.
        if self.drop == "position":
            return torch.argsort(routing.choice_N, stable=True)
        return torch.argsort(routing.weight_N.detach(), descending=True, stable=True)


def _rank_within_expert(routing: Routing, priority_N: Tensor) -> Tensor:
    """How many valid rows of the same expert are served before each row."""
    num_experts = routing.num_experts
    expert_N = torch.where(routing.valid_N, routing.expert_N, num_experts)[priority_N]
    by_expert_N = torch.argsort(expert_N, stable=True)
    count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_N.device)
    count_E.index_add_(0, expert_N, torch.ones_like(expert_N))
    start_E = count_E.cumsum(0) - count_E
    place_N = torch.arange(expert_N.shape[0], device=expert_N.device)
    rank_N = torch.empty_like(expert_N)
    rank_N[priority_N[by_expert_N]] = place_N - start_E[expert_N[by_expert_N]]
    return rank_N
