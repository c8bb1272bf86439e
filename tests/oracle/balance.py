"""What balance losses and controllers mean."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle.router import Table


def _zero(table: Table) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    for scores in table.scores:
        zero = zero + 0 * sum(scores)
    return zero


def switch(table: Table, tokens: list[int]) -> Tensor:
    """``E * sum_e f_e P_e`` over some tokens: share of rows times mean normalised score."""
    if not tokens:
        return _zero(table)
    num_experts = len(table.scores[0])
    rows = [row for row in table.rows if row.token in tokens]
    total = _zero(table)
    for e in range(num_experts):
        share = sum(row.expert == e for row in rows) / len(rows)
        mean = sum(table.scores[t][e] / sum(table.scores[t]) for t in tokens) / len(tokens)
        total = total + share * mean
    return num_experts * total


def sequence(table: Table, tokens: list[int], sequences: list[int]) -> Tensor:
    """The Switch loss of each sequence that holds a token, averaged."""
    losses = []
    for name in sorted({sequences[t] for t in tokens}):
        losses.append(switch(table, [t for t in tokens if sequences[t] == name]))
    return sum(losses) / len(losses) if losses else _zero(table)


def gshard(table: Table, tokens: list[int]) -> Tensor:
    """``E * sum_e f_e P_e`` where f counts each token's first choice alone."""
    if not tokens:
        return _zero(table)
    num_experts = len(table.scores[0])
    total = _zero(table)
    for e in range(num_experts):
        first = sum(row.choice == 0 and row.expert == e for row in table.rows if row.token in tokens)
        mean = sum(table.scores[t][e] / sum(table.scores[t]) for t in tokens) / len(tokens)
        total = total + first / len(tokens) * mean
    return num_experts * total


def squared_variation(values: list[Tensor]) -> Tensor:
    """Variance over the number of values, over the squared mean; 0 if all are 0."""
    mean = sum(values) / len(values)
    if mean.item() == 0:
        return 0 * mean
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def importance(table: Table, tokens: list[int]) -> Tensor:
    """Squared variation of what the weights of each expert add up to."""
    sums = [_zero(table) for _ in table.scores[0]] if table.scores else [torch.zeros((), dtype=torch.float64)]
    for row in table.rows:
        if row.token in tokens:
            sums[row.expert] = sums[row.expert] + row.weight
    return squared_variation(sums)


def z(table: Table, tokens: list[int]) -> Tensor:
    """Mean over tokens of the squared logarithm of the sum of exponentials."""
    squares = [sum(logit.exp() for logit in table.logits[t]).log() ** 2 for t in tokens]
    return sum(squares) / len(squares) if squares else _zero(table)


def bias_step(bias: list[float], loads: list[int], rate: float, rule: str) -> list[float]:
    """Push towards the mean load, then shift so that the pushes add up to 0."""
    if sum(loads) == 0:
        return bias
    mean = sum(loads) / len(loads)
    if rule == "sign":
        pushes = [(load < mean) - (load > mean) for load in loads]
    else:
        pushes = [(mean - load) / mean for load in loads]
    shift = sum(pushes) / len(pushes)
    return [value + rate * (push - shift) for value, push in zip(bias, pushes, strict=True)]
