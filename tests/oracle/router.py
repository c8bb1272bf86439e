"""What a router means."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Row:
    """One line of the routing table."""

    token: int
    choice: int
    expert: int
    weight: Tensor


@dataclass
class Table:
    """The routing table: rows, and for each token its logits and scores over the experts."""

    rows: list[Row] = field(default_factory=list)
    logits: list[list[Tensor]] = field(default_factory=list)
    scores: list[list[Tensor]] = field(default_factory=list)


def softmax(values: list[Tensor]) -> list[Tensor]:
    highest = max(value.item() for value in values)
    powers = [(value - highest).exp() for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def sigmoid(values: list[Tensor]) -> list[Tensor]:
    return [1 / (1 + (-value).exp()) for value in values]


SCORES = {"softmax": softmax, "sigmoid": sigmoid}


def best(values: list[float], count: int) -> list[int]:
    """Indices of the largest values, best first; of equal values the lowest index first."""
    taken: list[int] = []
    for _ in range(count):
        winner = None
        for index, value in enumerate(values):
            if index not in taken and (winner is None or value > values[winner]):
                winner = index
        taken.append(winner)
    return taken


def in_best_groups(values: list[float], num_groups: int, groups_kept: int, best_per_group: int) -> list[float]:
    """Put every expert outside the best groups out of reach."""
    size = len(values) // num_groups
    group_values = []
    for group in range(num_groups):
        members = sorted(values[group * size : (group + 1) * size], reverse=True)
        group_values.append(sum(members[:best_per_group]))
    kept = best(group_values, groups_kept)
    return [value if index // size in kept else -math.inf for index, value in enumerate(values)]


def route(
    x: Tensor,
    weight: Tensor,
    *,
    top_k: int,
    score: str,
    normalize: str,
    scale: float = 1.0,
    bias: list[float] | None = None,
    groups: tuple[int, int, int] | None = None,
) -> Table:
    """Route every token: score, add the bias, mask groups, pick, weigh by the unbiased score."""
    table = Table()
    for t in range(x.shape[0]):
        logits = [(x[t] * weight[e]).sum() for e in range(weight.shape[0])]
        scores = SCORES[score](logits)
        wanted = [value.item() for value in scores]
        if bias is not None:
            wanted = [value + push for value, push in zip(wanted, bias, strict=True)]
        if groups is not None:
            wanted = in_best_groups(wanted, *groups)
        chosen = best(wanted, top_k)
        if normalize == "scores":
            weights = [scores[e] for e in chosen]
        elif normalize == "chosen":
            total = sum(scores[e] for e in chosen)
            weights = [scores[e] / total for e in chosen]
        else:
            weights = SCORES[score]([logits[e] for e in chosen])
        for choice, (expert, value) in enumerate(zip(chosen, weights, strict=True)):
            table.rows.append(Row(token=t, choice=choice, expert=expert, weight=value * scale))
        table.logits.append(logits)
        table.scores.append(scores)
    return table
