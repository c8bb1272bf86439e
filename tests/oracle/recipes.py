"""What each recipe means, from its settings alone: which parts, put together how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.oracle import balance, dispatch, experts
from tests.oracle.router import Table, route


@dataclass
class Answer:
    """What a layer should return, and its recipe's losses by name, unscaled."""

    y: Tensor
    table: Table
    kept: list[bool]
    losses: dict[str, Tensor]


Weights = Mapping[str, Tensor]
Recipe = Callable[[Tensor, Weights, list[bool], list[int], bool, dict[str, Any]], Answer]


def _tokens(valid: list[bool]) -> list[int]:
    return [t for t, is_valid in enumerate(valid) if is_valid]


def switch(
    x: Tensor, weights: Weights, valid: list[bool], sequences: list[int], training: bool, options: dict[str, Any]
) -> Answer:
    """Top-1 of a softmax weighted by its probability; plain experts; capacity by position."""
    table = route(x, weights["router.weight"], top_k=options["top_k"], score="softmax", normalize="scores")
    factor = options.get("capacity_factor", 1.25) if training else options.get("eval_capacity_factor", 2.0)
    kept = dispatch.keep_by_capacity(
        table,
        valid,
        num_experts=options["num_experts"],
        factor=factor,
        minimum=options.get("min_capacity", 4),
        drop="position",
    )
    up, down = weights["experts.up_EDF"], weights["experts.down_EFD"]
    y = experts.combine(x, table, kept, None, up, down, options.get("activation", "relu"))
    return Answer(y, table, kept, {"switch": balance.switch(table, _tokens(valid))})


def mixtral(
    x: Tensor, weights: Weights, valid: list[bool], sequences: list[int], training: bool, options: dict[str, Any]
) -> Answer:
    """Softmax over the chosen logits, gated experts, nothing dropped."""
    table = route(x, weights["router.weight"], top_k=options["top_k"], score="softmax", normalize="logits")
    kept = dispatch.keep_all(table, valid)
    stacks = (weights["experts.gate_EDF"], weights["experts.up_EDF"], weights["experts.down_EFD"])
    y = experts.combine(x, table, kept, *stacks, options.get("activation", "silu"))
    return Answer(y, table, kept, {"switch": balance.switch(table, _tokens(valid))})


def deepseek_v3(
    x: Tensor, weights: Weights, valid: list[bool], sequences: list[int], training: bool, options: dict[str, Any]
) -> Answer:
    """Biased sigmoid within groups, weights renormalised and scaled, a shared expert beside the routed ones."""
    num_groups = options.get("num_groups", 1)
    table = route(
        x,
        weights["router.weight"],
        top_k=options["top_k"],
        score="sigmoid",
        normalize="chosen",
        scale=options.get("scale", 2.5),
        bias=weights["router.bias_E"].tolist(),
        groups=(num_groups, options.get("groups_kept", max(1, num_groups // 2)), 2) if num_groups > 1 else None,
    )
    kept = dispatch.keep_all(table, valid)
    activation = options.get("activation", "silu")
    stacks = (weights["experts.gate_EDF"], weights["experts.up_EDF"], weights["experts.down_EFD"])
    y = experts.combine(x, table, kept, *stacks, activation)
    if options.get("num_shared", 1):
        gate, up, down = weights["shared.gate_DF"], weights["shared.up_DF"], weights["shared.down_FD"]
        y = y + experts.shared(x, gate, up, down, None, activation)
    return Answer(y, table, kept, {"sequence": balance.sequence(table, _tokens(valid), sequences)})


ORACLES: dict[str, Recipe] = {"switch": switch, "mixtral": mixtral, "deepseek-v3": deepseek_v3}
