"""Token choice: each token takes its best experts."""

from __future__ import annotations

from typing import Any

from tests.oracle import balance, dispatch, experts
from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.router import route


def switch(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Top-1 of a softmax weighted by its probability; plain experts; capacity by position."""
    table = route(case.x, weights["router.weight"], top_k=options["top_k"], score="softmax", normalize="scores")
    factor = options.get("capacity_factor", 1.25) if case.training else options.get("eval_capacity_factor", 2.0)
    kept = dispatch.keep_by_capacity(
        table,
        case.valid,
        num_experts=options["num_experts"],
        factor=factor,
        minimum=options.get("min_capacity", 4),
        drop="position",
    )
    up, down = weights["experts.up_EDF"], weights["experts.down_EFD"]
    y = experts.combine(case.x, table, kept, None, up, down, options.get("activation", "relu"))
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


def mixtral(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Softmax over the chosen logits, gated experts, nothing dropped."""
    table = route(case.x, weights["router.weight"], top_k=options["top_k"], score="softmax", normalize="logits")
    kept = dispatch.keep_all(table, case.valid)
    stacks = (weights["experts.gate_EDF"], weights["experts.up_EDF"], weights["experts.down_EFD"])
    y = experts.combine(case.x, table, kept, *stacks, options.get("activation", "silu"))
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


def deepseek_v3(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Biased sigmoid within groups, weights renormalised and scaled, a shared expert beside the routed ones."""
    num_groups = options.get("num_groups", 1)
    table = route(
        case.x,
        weights["router.weight"],
        top_k=options["top_k"],
        score="sigmoid",
        normalize="chosen",
        scale=options.get("scale", 2.5),
        bias=weights["router.bias_E"].tolist(),
        groups=(num_groups, options.get("groups_kept", max(1, num_groups // 2)), 2) if num_groups > 1 else None,
    )
    kept = dispatch.keep_all(table, case.valid)
    activation = options.get("activation", "silu")
    stacks = (weights["experts.gate_EDF"], weights["experts.up_EDF"], weights["experts.down_EFD"])
    y = experts.combine(case.x, table, kept, *stacks, activation)
    if options.get("num_shared", 1):
        gate, up, down = weights["shared.gate_DF"], weights["shared.up_DF"], weights["shared.down_FD"]
        y = y + experts.shared(case.x, gate, up, down, None, activation)
    return Answer(y, table, kept, {"sequence": balance.sequence(table, case.tokens, case.sequences)})


ORACLES: dict[str, Oracle] = {"switch": switch, "mixtral": mixtral, "deepseek-v3": deepseek_v3}
