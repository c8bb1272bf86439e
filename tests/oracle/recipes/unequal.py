"""Experts of unequal cost, and experts beside a network that is always on."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch

from tests.oracle import balance, dispatch, experts
from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.router import Row, Table, best, route, softmax


def kinds(options: dict[str, Any]) -> tuple[int, int, int, int]:
    """How many experts are feed-forward, constant, copy and zero."""
    num_experts = options["num_experts"]
    special = min(8 if num_experts > 20 else 4, num_experts // 2)
    zero = options.get("num_zero", 1 if special >= 1 else 0)
    copy = options.get("num_copy", 1 if special >= 2 else 0)
    constant = options.get("num_constant", max(special - 2, 0))
    return num_experts - constant - copy - zero, constant, copy, zero


def keep_heterogeneous(
    table: Table, case: Case, num_ffn: int, num_special: int, gamma: float, tau: float
) -> list[bool]:
    """Places in proportion to tau for feed-forward experts and 1 for the others, first choices first."""
    rows = [index for index, row in enumerate(table.rows) if case.valid[row.token]]
    rows.sort(key=lambda index: (table.rows[index].choice, table.rows[index].token))
    tau_, gamma_ = Fraction(str(tau)), Fraction(str(gamma))
    one = gamma_ * len(rows) / (tau_ * num_ffn + num_special)
    room = [math.ceil(tau_ * one)] * num_ffn + [math.ceil(one)] * num_special
    kept = [False] * len(table.rows)
    for index in rows:
        expert = table.rows[index].expert
        if room[expert] > 0:
            room[expert] -= 1
            kept[index] = True
    return kept


def moe_plus_plus(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Top-K of a softmax with the logits from below; networks, constants, copies and zeros."""
    num_experts, tau = options["num_experts"], options.get("tau", 0.75)
    num_ffn, num_constant, num_copy, num_zero = kinds(options)
    special = num_constant + num_copy + num_zero
    table = Table()
    for t in range(len(case.valid)):
        x = case.x[t]
        if options.get("router_net", "linear") == "tanh":
            x = torch.stack([(x * line).sum().tanh() for line in weights["router.inner_weight"]])
        logits = []
        for e in range(num_experts):
            residual = sum(weights["router.below_weight"][e][j] * case.below[t][j] for j in range(num_experts))
            logits.append((x * weights["router.weight"][e]).sum() + residual)
        scores = softmax(logits)
        for choice, e in enumerate(best([score.item() for score in scores], options["top_k"])):
            table.rows.append(Row(token=t, choice=choice, expert=e, weight=scores[e]))
        table.logits.append(logits)
        table.scores.append(scores)
    if case.training or options.get("eval_capacity_factor") is not None:
        gamma = options.get("capacity_factor", 1.1) if case.training else options["eval_capacity_factor"]
        kept = keep_heterogeneous(table, case, num_ffn, special, gamma, tau)
    else:
        kept = dispatch.keep_all(table, case.valid)
    prefix = "experts.0." if special else "experts."
    stacks = [weights[f"{prefix}{name}"] for name in ("gate_EDF", "up_EDF", "down_EFD")]
    y = [case.x[t] * 0 for t in range(len(case.valid))]
    for row, keep in zip(table.rows, kept, strict=True):
        x, e = case.x[row.token], row.expert
        if not keep or e >= num_ffn + num_constant + num_copy:  # dropped, or zero
            continue
        if e < num_ffn:
            made = experts.feed_forward(x, *(stack[e] for stack in stacks), options.get("activation", "silu"))
        elif e < num_ffn + num_constant:
            mix_weight = weights[f"experts.1.{e - num_ffn}.mix_weight"]
            a, b = softmax([(x * mix_weight[0]).sum(), (x * mix_weight[1]).sum()])
            made = a * x + b * weights[f"experts.1.{e - num_ffn}.constant_D"]
        else:
            made = x
        y[row.token] = y[row.token] + row.weight * made
    losses = {"heterogeneous": heterogeneous(table, case, num_ffn, tau)}
    return Answer(torch.stack(y) if y else case.x * 1, table, kept, losses)


def heterogeneous(table: Table, case: Case, num_ffn: int, tau: float) -> torch.Tensor:
    """``sum_e eta_e * rows of e / tokens * mean probability of e``."""
    total = torch.zeros((), dtype=torch.float64)
    if not case.tokens:
        return total + 0 * case.x.sum()
    for e in range(len(table.scores[0])):
        share = sum(row.expert == e and case.valid[row.token] for row in table.rows) / len(case.tokens)
        mean = sum(table.scores[t][e] for t in case.tokens) / len(case.tokens)
        total = total + (1 if e < num_ffn else tau) * share * mean
    return total


def residual_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """A network for every token, and its best expert."""
    table = route(case.x, weights["router.weight"], top_k=options["top_k"], score="softmax", normalize="scores")
    factor = options.get("capacity_factor", 1.0) if case.training else options.get("eval_capacity_factor", 1.0)
    kept = dispatch.keep_by_capacity(
        table,
        case.valid,
        num_experts=options["num_experts"],
        factor=factor,
        minimum=options.get("min_capacity", 4),
        drop="position",
    )
    activation = options.get("activation", "gelu")
    up, down = weights["experts.up_EDF"], weights["experts.down_EFD"]
    y = experts.combine(case.x, table, kept, None, up, down, activation)
    added = []
    for t in range(len(case.valid)):
        x = case.x[t]
        always = experts.feed_forward(x, None, weights["shared.up_DF"], weights["shared.down_FD"], activation)
        if options.get("combine", "sum") == "sum":
            added.append(y[t] + always)
        else:
            logits = [(x * weights["mix.mix_weight"][i]).sum() + weights["mix.mix_bias"][i] for i in (0, 1)]
            a, b = softmax(logits)
            added.append(a * y[t] + b * always)
    losses = {"switch": balance.switch(table, case.tokens)}
    return Answer(torch.stack(added) if added else y, table, kept, losses)


ORACLES: dict[str, Oracle] = {"moe++": moe_plus_plus, "residual-moe": residual_moe, "pr-moe": residual_moe}
