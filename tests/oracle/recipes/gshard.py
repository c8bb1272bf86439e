"""The GShard line: a second expert by chance, capacity in groups, dense networks beside or behind the sparse one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.oracle import balance, dispatch, experts
from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.router import Row, Table, best, route, softmax


def _sampled(case: Case, weight: Tensor, top_k: int, threshold: float) -> Table:
    """The K best, weighed against each other; in training all but the first go with some chance."""
    num_tokens, table = len(case.valid), Table()
    drawn = torch.rand(num_tokens, top_k - 1, dtype=torch.float64).tolist() if case.training else None
    for t in range(num_tokens):
        logits = [(case.x[t] * weight[e]).sum() for e in range(weight.shape[0])]
        chosen = best([value.item() for value in logits], top_k)
        rank = 0
        for place, (e, share) in enumerate(zip(chosen, softmax([logits[e] for e in chosen]), strict=True)):
            chance = 1.0 if threshold == 0 else min(1.0, share.item() / threshold)
            if place == 0 or drawn is None or drawn[t][place - 1] <= chance:
                table.rows.append(Row(t, rank, e, share))
                rank += 1
        table.logits.append(logits)
        table.scores.append(softmax(logits))
    return table


def _capped(case: Case, table: Table, options: dict[str, Any], factor: float, eval_factor: float) -> list[bool]:
    """Capacity per group of tokens: those of a sequence, or neighbours."""
    size = options.get("group_size")
    return dispatch.keep_by_capacity(
        table,
        case.valid,
        num_experts=options["num_experts"],
        factor=options.get("capacity_factor", factor)
        if case.training
        else options.get("eval_capacity_factor", eval_factor),
        minimum=options.get("min_capacity", 4),
        drop="position",
        groups=case.sequences if size is None else dispatch.groups_of(case.valid, size),
        per="token",
    )


def _stacks(weights: Weights) -> tuple[Tensor | None, Tensor, Tensor]:
    return weights.get("experts.gate_EDF"), weights["experts.up_EDF"], weights["experts.down_EFD"]


def _plain(case: Case, weights: Weights, options: dict[str, Any], activation: str) -> Answer:
    table = _sampled(case, weights["router.weight"], options["top_k"], options.get("second_threshold", 0.5))
    kept = _capped(case, table, options, 2.0, 2.0)
    y = experts.combine(case.x, table, kept, *_stacks(weights), options.get("activation", activation))
    return Answer(y, table, kept, {"gshard": balance.gshard(table, case.tokens)})


def gshard(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """ReLU experts."""
    return _plain(case, weights, options, "relu")


def glam(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """GELU experts."""
    return _plain(case, weights, options, "gelu")


def st_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """GEGLU experts, and a dense network on the norm of input plus output."""
    activation = options.get("activation", "gelu_tanh")
    table = _sampled(case, weights["router.weight"], options["top_k"], options.get("second_threshold", 0.2))
    kept = _capped(case, table, options, 1.25, 2.0)
    y = experts.combine(case.x, table, kept, *_stacks(weights), activation)
    if options.get("sparse_dense", True):
        dense = [weights[f"after.ffn.{name}"] for name in ("gate_DF", "up_DF", "down_FD")]
        outputs = []
        for t in range(len(case.valid)):
            seen = case.x[t] + y[t]
            seen = seen / ((seen * seen).mean() + 1e-6).sqrt() * weights["after.norm.weight"]
            outputs.append(y[t] + experts.feed_forward(seen, *dense, activation))
        y = torch.stack(outputs) if outputs else y
    losses = {"gshard": balance.gshard(table, case.tokens), "z": balance.z(table, case.tokens)}
    return Answer(y, table, kept, losses)


def openmoe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Bare probabilities, one capacity for the batch, a dense network beside the experts."""
    activation = options.get("activation", "silu")
    table = route(case.x, weights["router.weight"], top_k=options["top_k"], score="softmax", normalize="scores")
    kept = dispatch.keep_by_capacity(
        table,
        case.valid,
        num_experts=options["num_experts"],
        factor=options.get("capacity_factor", 1.25) if case.training else options.get("eval_capacity_factor", 2.0),
        minimum=options.get("min_capacity", 4),
        drop="position",
    )
    y = experts.combine(case.x, table, kept, *_stacks(weights), activation)
    dense = [weights[f"shared.{name}"] for name in ("gate_DF", "up_DF", "down_FD")]
    y = y + experts.shared(case.x, *dense, None, activation)
    losses = {"switch": balance.switch(table, case.tokens), "z": balance.z(table, case.tokens)}
    return Answer(y, table, kept, losses)


def minimax_01(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Renormalised over the two, nothing dropped."""
    table = route(case.x, weights["router.weight"], top_k=options["top_k"], score="softmax", normalize="chosen")
    kept = dispatch.keep_all(table, case.valid)
    y = experts.combine(case.x, table, kept, *_stacks(weights), options.get("activation", "silu"))
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


ORACLES: dict[str, Oracle] = {
    "gshard": gshard,
    "glam": glam,
    "st-moe": st_moe,
    "openmoe": openmoe,
    "minimax-01": minimax_01,
}
