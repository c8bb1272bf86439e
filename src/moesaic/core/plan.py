"""In which order the rows are worked, and which are left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.core.routing import Routing


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """The rows of a routing table, sorted by expert, those that reach no expert last.

    Expert ``e`` works on places ``offset_E[e - 1]`` to ``offset_E[e]``; places from ``offset_E[-1]`` on are padding
    or dropped. Within one expert, rows keep the order of the table, so every sum is taken in the same order each time.

    Attributes:
        row_N: the routing row at each place, int64: gather with it.
        token_N: that row's token, int64.
        weight_N: that row's weight; carries the router's gradient.
        load_E: rows that each expert works on, int64; padding and dropped rows left out.
        offset_E: cumulative ``load_E``, where each expert's rows end, int64.
        kept_N: for each *routing* row, False if it reaches no expert, bool.
    """

    row_N: Tensor
    token_N: Tensor
    weight_N: Tensor
    load_E: Tensor
    offset_E: Tensor
    kept_N: Tensor

    @classmethod
    def from_kept(cls, routing: Routing, kept_N: Tensor) -> Plan:
        """Sort the rows that ``kept_N`` marks by expert; the rest go last.

        Args:
            routing: the table.
            kept_N: bool (N,), False for rows that no expert may take.
        """
        return cls.from_rows(routing.expert_N, routing.token_N, routing.weight_N, routing.num_experts, kept_N)

    @classmethod
    def from_rows(cls, expert_N: Tensor, token_N: Tensor, weight_N: Tensor, num_experts: int, kept_N: Tensor) -> Plan:
        """Sort rows that are known without a table.

        The plain truth: :mod:`moesaic.kernels.sort_rows` gives the same numbers, faster where it can.

        Args:
            expert_N: the expert of each row; of rows left out, any number.
            token_N: its token.
            weight_N: its weight.
            num_experts: E.
            kept_N: bool (N,), False for rows that no expert may take.
        """
        # Rows left out sort as if they went to an expert after the last.
        expert_N = torch.where(kept_N, expert_N, num_experts)
        row_N = torch.sort(expert_N, stable=True)[1]
        load_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=kept_N.device)
        load_E = load_E.index_add_(0, expert_N, torch.ones_like(expert_N))[:num_experts]
        return cls(
            row_N=row_N,
            token_N=token_N.index_select(0, row_N),
            weight_N=weight_N.index_select(0, row_N),
            load_E=load_E,
            offset_E=load_E.cumsum(0),
            kept_N=kept_N,
        )

    def only(self, start: int, end: int) -> Plan:
        """The plan of experts ``start`` to ``end - 1`` alone, which become its experts 0, 1 and so on.

        Nothing that waits behind the last expert, padding or dropped, comes along.
        """
        before = int(self.offset_E[start - 1]) if start > 0 else 0
        places = slice(before, int(self.offset_E[end - 1]) if end > start else before)
        row_N = self.row_N[places]
        kept_N = torch.zeros_like(self.kept_N)
        kept_N[row_N] = True
        return Plan(
            row_N=row_N,
            token_N=self.token_N[places],
            weight_N=self.weight_N[places],
            load_E=self.load_E[start:end],
            offset_E=self.offset_E[start:end] - before,
            kept_N=kept_N,
        )

    @property
    def num_experts(self) -> int:
        """Experts that the plan serves."""
        return self.load_E.shape[0]
