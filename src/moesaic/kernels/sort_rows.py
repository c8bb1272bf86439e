"""Sorting rows by expert: plain in :meth:`Plan.from_rows`, in C where it is compiled."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.plan import Plan
from moesaic.core.routing import Routing
from moesaic.kernels.native import calls


def sort_kept(routing: Routing, kept_N: Tensor) -> Plan:
    """What :meth:`Plan.from_kept` makes, number by number, faster where it can be."""
    return sort_rows(routing.expert_N, routing.token_N, routing.weight_N, routing.num_experts, kept_N)


def sort_rows(expert_N: Tensor, token_N: Tensor, weight_N: Tensor, num_experts: int, kept_N: Tensor) -> Plan:
    """What :meth:`Plan.from_rows` makes, number by number, faster where it can be."""
    found = calls.sort_rows(expert_N, token_N, kept_N, num_experts)
    if found is None:
        return Plan.from_rows(expert_N, token_N, weight_N, num_experts, kept_N)
    row_N, place_token_N, load_E, offset_E = found
    return Plan(
        row_N=row_N,
        token_N=place_token_N,
        weight_N=weight_N.index_select(0, row_N),
        load_E=load_E,
        offset_E=offset_E,
        kept_N=kept_N,
    )
