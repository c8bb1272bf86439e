"""A Routing reduced to a few numbers at once, so that no step keeps tables alive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.core.routing import Routing


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoutingSummary:
    """What one layer did with some tokens; summaries of the same layer add up.

    Attributes:
        load_E: rows that the router gave each expert, int64; padding left out, dropped rows counted.
        kept_E: those of them that dispatch kept, int64.
        num_tokens: tokens routed, int64 scalar.
        entropy_sum: sum over tokens of the entropy of their probabilities over experts, in nats, float64 scalar.
    """

    load_E: Tensor
    kept_E: Tensor
    num_tokens: Tensor
    entropy_sum: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, routing: Routing) -> RoutingSummary:
        """Reduce one layer's table."""
        entropy_T = torch.special.entr(routing.probability_TE).sum(dim=-1)
        kept_E = torch.zeros(routing.num_experts, dtype=torch.int64, device=routing.expert_N.device)
        return cls(
            load_E=routing.load_E,
            kept_E=kept_E.index_add_(0, routing.expert_N, (routing.valid_N & routing.kept_N).to(torch.int64)),
            num_tokens=routing.valid_T.sum(),
            entropy_sum=entropy_T.masked_fill(~routing.valid_T, 0).sum(dtype=torch.float64),
        )

    def __add__(self, other: RoutingSummary) -> RoutingSummary:
        return RoutingSummary(
            load_E=self.load_E + other.load_E,
            kept_E=self.kept_E + other.kept_E,
            num_tokens=self.num_tokens + other.num_tokens,
            entropy_sum=self.entropy_sum + other.entropy_sum,
        )

    @property
    def experts_per_token(self) -> float:
        """Rows for each token, on average: K where every token has as many."""
        tokens = int(self.num_tokens)
        return int(self.load_E.sum()) / tokens if tokens else 0.0

    @property
    def load_max_over_mean(self) -> float:
        """The busiest expert's load over the mean of all experts, idle ones counted; 1 is perfect balance."""
        total = int(self.load_E.sum())
        return float(self.load_E.max()) * self.load_E.shape[0] / total if total else 1.0

    @property
    def num_dropped(self) -> int:
        """Rows that capacity dropped."""
        return int(self.load_E.sum() - self.kept_E.sum())

    @property
    def drop_rate(self) -> float:
        """Share of rows that capacity dropped."""
        total = int(self.load_E.sum())
        return self.num_dropped / total if total else 0.0

    @property
    def entropy(self) -> float:
        """Mean entropy of a token's probabilities over experts, in nats; ``ln(E)`` where the router is undecided."""
        tokens = int(self.num_tokens)
        return float(self.entropy_sum) / tokens if tokens else 0.0
