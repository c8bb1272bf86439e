"""The rows that go into the experts of an adopted layer, for those who want to know what each expert makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.core.plan import Plan
from moesaic.kernels.sort_rows import sort_rows

Each = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From rows (N, D), the expert of each (N,) and its weight (N,) to what each expert gives for its row alone (N, D)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Work:
    """What one layer's experts are about to do in one forward.

    Attributes:
        experts: the module that holds them.
        x_TD: what they read.
        plan: who reads what, with which weight.
        each: runs rows by themselves; it is the family's own code or the kernel that was compared with it.
        weighs_input: whether the weight multiplies what goes in, and not what comes out.
    """

    experts: nn.Module
    x_TD: Tensor
    plan: Plan
    each: Each
    weighs_input: bool = False


Look = Callable[[Work], None]
_LOOKS: ContextVar[tuple[Look, ...]] = ContextVar("moesaic.hf.looks", default=())


@contextmanager
def looking(look: Look) -> Iterator[None]:
    """Call ``look`` before the experts of any adopted layer run, in the forwards that start within, in this thread."""
    token = _LOOKS.set((*_LOOKS.get(), look))
    try:
        yield
    finally:
        _LOOKS.reset(token)


def is_looked_at() -> bool:
    """Whether anybody wants to see work here, for blocks that need no plan of their own."""
    return bool(_LOOKS.get())


def show(experts: nn.Module, x_TD: Tensor, plan: Plan, each: Each, *, weighs_input: bool = False) -> None:
    """Let those who are looking see a layer's work, if there are any."""
    for look in _LOOKS.get():
        look(Work(experts=experts, x_TD=x_TD, plan=plan, each=each, weighs_input=weighs_input))


def alone(expert_N: Tensor, weight_N: Tensor, num_experts: int) -> Plan:
    """The plan of rows that are a token each."""
    row_N = torch.arange(len(expert_N), device=expert_N.device)
    return sort_rows(expert_N, row_N, weight_N, num_experts, torch.ones_like(row_N, dtype=torch.bool))
