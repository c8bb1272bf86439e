"""Where the time of a step goes: router, dispatch and experts, each alone, beside the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from moesaic.bench import goals
from moesaic.bench.draw import Draw
from moesaic.bench.ours import router_of, with_router
from moesaic.bench.result import Goal, Group, Line
from moesaic.bench.timing import Work, clock_of, interleaved, ratios
from moesaic.dispatch import Sort

WHOLE, ROUTER, DISPATCH, EXPERTS, SHARED = "whole layer", "router", "dispatch", "experts", "shared expert"
OVERHEAD = "router and dispatch"


def breakdown(
    drawn: Draw, *, training: bool, rounds: int, title: str, say: Callable[[str], None] = lambda _line: None
) -> Group:
    """Time the parts of our layer and the whole, in the same rounds; ratios are shares of the whole.

    Args:
        drawn: weights and tokens.
        training: each with its backward.
        rounds: that count.
        title: of the case.
        say: told what is being done.
    """
    works = _works(drawn, training=training)
    times = interleaved(works, rounds=rounds, clock=clock_of(drawn.device), say=say)
    times[OVERHEAD] = tuple(a + b for a, b in zip(times[ROUTER], times[DISPATCH], strict=True))
    lines = []
    for name, values in times.items():
        share = ratios(values, times[WHOLE])
        reached: tuple[Goal, ...] = ()
        if name == OVERHEAD and training and goals.has_goals(drawn.case) and drawn.case.name == "very-fine":
            reached = (Goal(what="of a step", bound=goals.OVERHEAD, at_most=True, value=median(share)),)
        lines.append(Line(name=name, samples=tuple(1e3 * value for value in values), ratios=share, goals=reached))
    mode = "training step" if training else "forward"
    facts: dict[str, str | int | float | bool] = {
        "case": drawn.case.name,
        "mode": "train" if training else "forward",
        "kind": "parts",
        "dtype": str(drawn.dtype).removeprefix("torch."),
        "shared": drawn.case.shared_hidden,
        "zipf": drawn.case.zipf,
    }
    return Group(title=f"{title}, {mode}, in parts", unit="ms", limit=WHOLE, lines=tuple(lines), facts=facts)


def _works(drawn: Draw, *, training: bool) -> dict[str, Work]:
    router = router_of(drawn)
    whole = with_router(drawn)
    routing = drawn.routing
    weight_N = routing.weight_N.detach().requires_grad_()
    handed = replace(routing, weight_N=weight_N)
    sort = Sort()
    with torch.no_grad():
        plan = sort(handed)
    given_N = plan.weight_N.detach().requires_grad_()
    plan = replace(plan, weight_N=given_N)
    grad_N = torch.ones_like(weight_N)
    experts, shared = drawn.experts, drawn.shared
    leaves = (drawn.x_TD, drawn.weight_TK, weight_N, given_N, *router.parameters(), *experts.parameters())

    def clear() -> None:
        whole.clear()
        for leaf in leaves:
            leaf.grad = None

    def work(forward: Callable[[], Tensor], grad: Tensor) -> Work:
        if training:
            return Work(run=lambda: torch.autograd.backward(forward(), grad), before=clear)
        return Work(run=torch.no_grad()(forward), before=clear)

    works = {
        WHOLE: work(whole.forward, drawn.grad_y_TD),
        ROUTER: work(lambda: router(drawn.x_TD).weight_N, grad_N),
        DISPATCH: work(lambda: sort(handed).weight_N, grad_N),
        EXPERTS: work(partial(experts, drawn.x_TD, plan), drawn.grad_y_TD),
    }
    if shared is not None:
        works[SHARED] = work(partial(shared, drawn.x_TD), drawn.grad_y_TD)
    return works
