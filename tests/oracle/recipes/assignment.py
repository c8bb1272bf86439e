"""Designs that share tokens out evenly: by an exact assignment, by a transport plan, or by letting experts choose."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.oracle import dispatch, experts
from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.router import Row, Table, best, sigmoid, softmax


def linear(x: Tensor, weight: Tensor) -> list[list[Tensor]]:
    """Each token's logits."""
    return [[(x[t] * weight[e]).sum() for e in range(weight.shape[0])] for t in range(x.shape[0])]


def numbers(lines: list[list[Tensor]]) -> list[list[float]]:
    """The same without gradients."""
    return [[value.item() for value in line] for line in lines]


def plain_experts(case: Case, table: Table, weights: Weights, activation: str) -> tuple[Tensor, list[bool]]:
    """Outputs of experts ``act(x up) down``, nothing dropped."""
    kept = dispatch.keep_all(table, case.valid)
    up, down = weights["experts.up_EDF"], weights["experts.down_EFD"]
    return experts.combine(case.x, table, kept, None, up, down, activation), kept


def evenly(value: list[list[float]]) -> list[int]:
    """The expert of each token, loads differing by one at most, so that the values add up to the most.

    Tokens come in one by one. Each takes the best chain of moves: it goes to one expert, pushes one of its tokens to
    another, and so on, until the last has room (shortest augmenting paths, which keep the assignment optimal). Room is
    first the smaller load for all; then one more for each, of which only the tokens left over use any.
    """
    num_tokens = len(value)
    num_experts = len(value[0]) if value else 1
    placed: dict[int, int] = {}
    # With a bonus for filling an expert up to the smaller load, the best assignment is one that fills them all.
    sure = num_tokens // num_experts
    bonus = 1e6

    def gain_of_one_more(e: int) -> float | None:
        load = list(placed.values()).count(e)
        if load < sure:
            return bonus
        return 0.0 if load < -(-num_tokens // num_experts) else None

    for token in range(num_tokens):
        reach = [value[token][e] for e in range(num_experts)]
        way: list[list[tuple[int, int]]] = [[(token, e)] for e in range(num_experts)]
        for _ in range(num_experts):
            for source in range(num_experts):
                for other in [u for u, e in placed.items() if e == source]:
                    for target in range(num_experts):
                        pushed = reach[source] - value[other][source] + value[other][target]
                        moving = [u for u, _ in way[source]]
                        if other not in moving and pushed > reach[target] + 1e-12:
                            reach[target], way[target] = pushed, [*way[source], (other, target)]
        ends = [(e, gain_of_one_more(e)) for e in range(num_experts)]
        total = {e: reach[e] + gain for e, gain in ends if gain is not None}
        for moved, e in way[max(total, key=lambda e: total[e])]:
            placed[moved] = e
    return [placed[t] for t in range(num_tokens)]


def in_parts(tokens: list[int], num_experts: int, most: int) -> list[list[int]]:
    """Cut a batch into parts of about equal size, all but the last a multiple of E, of every n-th token."""
    if not tokens:
        return []
    largest = max(num_experts, most - most % num_experts)
    count = math.ceil(len(tokens) / largest)
    size = math.ceil(len(tokens) / count / num_experts) * num_experts
    dealt = [token for first in range(count) for token in tokens[first::count]]
    return [dealt[start : start + size] for start in range(0, len(dealt), size)]


def base(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Assign evenly in training, take the best in evaluation; weigh what residual sublayers add by a sigmoid."""
    logits = linear(case.x, weights["router.weight"])
    values = numbers(logits)
    num_experts = options["num_experts"]
    expert = [best(line, 1)[0] for line in values]
    if case.training:
        for part in in_parts(case.tokens, num_experts, options.get("assign_tokens", 1024)):
            for token, e in zip(part, evenly([values[t] for t in part]), strict=True):
                expert[token] = e
    table = Table(logits=logits, scores=[sigmoid(line) for line in logits])
    outputs = []
    for t, e in enumerate(expert):
        table.rows.append(Row(token=t, choice=0, expert=e, weight=table.scores[t][e]))
        added = torch.zeros_like(case.x[t])
        if case.valid[t]:
            for layer in range(options.get("sublayers", 1)):
                names = f"experts.{e}.sublayers.{layer}."
                layer_weights = {name[len(names) :]: w for name, w in weights.items() if name.startswith(names)}
                added = added + sublayer(case.x[t] + added, layer_weights, options.get("activation", "relu"))
        outputs.append(table.scores[t][e] * added)
    y = torch.stack(outputs) if outputs else case.x * 1
    return Answer(y, table, dispatch.keep_all(table, case.valid), {})


def sublayer(h: Tensor, weights: Weights, activation: str) -> Tensor:
    """``W2 act(W1 LN(h) + b1) + b2``."""
    mean = h.sum() / h.shape[0]
    variance = ((h - mean) ** 2).sum() / h.shape[0]
    normed = (h - mean) / (variance + 1e-5).sqrt() * weights["norm.weight"] + weights["norm.bias"]
    hidden = (weights["up.weight"] * normed).sum(dim=1) + weights["up.bias"]
    return (weights["down.weight"] * experts.ACTIVATIONS[activation](hidden)).sum(dim=1) + weights["down.bias"]


def transport(logits: list[list[float]]) -> list[list[float]]:
    """Megatron's iteration: scale rows, scale columns, until the columns' factors stay."""
    count, num_experts = len(logits), len(logits[0])
    kernel = [[math.exp(value - max(line)) for value in line] for line in logits]
    columns = [1.0] * num_experts
    while True:
        rows = [1 / count / (sum(k * c for k, c in zip(line, columns, strict=True)) + 1e-8) for line in kernel]
        before = columns
        columns = [
            1 / num_experts / (sum(r * line[e] for r, line in zip(rows, kernel, strict=True)) + 1e-8)
            for e in range(num_experts)
        ]
        if sum(abs(new - old) for new, old in zip(columns, before, strict=True)) / num_experts <= 1e-4:
            return [
                [r * k * c for k, c in zip(line, columns, strict=True)] for r, line in zip(rows, kernel, strict=True)
            ]


def sinkhorn(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Choose by the plan in training, by the logits in evaluation; weigh by the token's own scores."""
    top_k = options["top_k"]
    logits = linear(case.x, weights["router.weight"])
    wanted = numbers(logits)
    if case.training and case.tokens:
        for token, line in zip(case.tokens, transport([wanted[t] for t in case.tokens]), strict=True):
            wanted[token] = line
    score = sigmoid if top_k == 1 else softmax
    table = Table(logits=logits, scores=[score(line) for line in logits])
    for t, line in enumerate(wanted):
        for choice, e in enumerate(best(line, top_k)):
            table.rows.append(Row(token=t, choice=choice, expert=e, weight=table.scores[t][e]))
    y, kept = plain_experts(case, table, weights, options.get("activation", "gelu"))
    return Answer(y, table, kept, {})


def rows_by_weight(table: Table, weight: list[list[Tensor]], chosen: list[set[int]]) -> None:
    """Add each token's experts to the table, the largest weight first, of equal ones the lowest expert."""
    for t, some in enumerate(chosen):
        for choice, e in enumerate(sorted(some, key=lambda e: (-weight[t][e].item(), e))):
            table.rows.append(Row(token=t, choice=choice, expert=e, weight=weight[t][e]))


def price(wishes: list[float], limit: int) -> float:
    """The p at which all of ``min(1, exp(wish - p))`` add up to the limit; the least wish if every one is 1."""
    falling = sorted(wishes, reverse=True)
    for ones in range(min(limit, len(wishes))):  # so many are at 1, all others share what is left
        others = falling[ones:]
        shared = others[0] + math.log(sum(math.exp(wish - others[0]) for wish in others)) - math.log(limit - ones)
        if others[0] <= shared:
            return shared
    return falling[-1]


def capped(scores: list[list[float]], take: int, cap: int) -> list[list[float]]:
    """Experts set the price at which they get so many tokens, tokens the one at which no more than the cap get them."""
    gain = [[value / 1e-3 for value in line] for line in scores]
    num_experts = len(gain[0])
    tokens = [0.0] * len(gain)

    def of_experts() -> list[float]:
        return [
            price([line[e] - paid for line, paid in zip(gain, tokens, strict=True)], take) for e in range(num_experts)
        ]

    for _ in range(100):
        experts_ = of_experts()
        before = tokens
        tokens = [max(0.0, price([g - p for g, p in zip(line, experts_, strict=True)], cap)) for line in gain]
        if max(abs(new - old) for new, old in zip(tokens, before, strict=True)) <= 1e-6:
            break
    experts_ = of_experts()
    return [
        [math.exp(min(0.0, g - paid - p)) for g, p in zip(line, experts_, strict=True)]
        for line, paid in zip(gain, tokens, strict=True)
    ]


def expert_choice(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Every expert takes its best tokens of the batch or of each sequence; softmax scores weigh."""
    num_experts = options["num_experts"]
    logits = linear(case.x, weights["router.weight"])
    table = Table(logits=logits, scores=[softmax(line) for line in logits])
    by_sequence = options.get("group", "batch") == "sequence"
    groups = sorted({case.sequences[t] for t in case.tokens}) if by_sequence else [None]
    chosen: list[set[int]] = [set() for _ in logits]
    for group in groups:
        tokens = [t for t in case.tokens if group is None or case.sequences[t] == group]
        if not tokens:
            continue
        share = options.get("capacity_factor") or options["top_k"]
        take = min(len(tokens), max(1, math.floor(len(tokens) * share / num_experts)))
        wanted = [[value.item() for value in table.scores[t]] for t in tokens]
        if options.get("cap") is not None:
            wanted = capped(wanted, take, options["cap"])
        for e in range(num_experts):
            for place in best([line[e] for line in wanted], take):
                chosen[tokens[place]].add(e)
    rows_by_weight(table, table.scores, chosen)
    y, kept = plain_experts(case, table, weights, options.get("activation", "gelu"))
    return Answer(y, table, kept, {})


def mod(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Each expert takes the best share of every sequence in training, what it rates above 0 in evaluation."""
    num_experts = options["num_experts"]
    logits = linear(case.x, weights["router.weight"])
    values = numbers(logits)
    chosen: list[set[int]] = [set() for _ in logits]
    for e in range(num_experts):
        if not case.training:
            for t in case.tokens:
                if values[t][e] > 0:
                    chosen[t].add(e)
            continue
        for sequence in sorted({case.sequences[t] for t in case.tokens}):
            tokens = [t for t in case.tokens if case.sequences[t] == sequence]
            take = max(1, math.floor(options.get("capacity", 0.125) * len(tokens)))
            for place in best([values[t][e] for t in tokens], take):
                chosen[tokens[place]].add(e)
    table = Table(logits=logits, scores=[sigmoid(line) for line in logits])
    rows_by_weight(table, logits, chosen)
    y, kept = plain_experts(case, table, weights, options.get("activation", "gelu"))
    loss = sum((0 * value for line in logits for value in line), start=torch.zeros((), dtype=torch.float64))
    for t in case.tokens:
        for e in range(num_experts):
            probability = table.scores[t][e] if e in chosen[t] else 1 - table.scores[t][e]
            loss = loss - probability.log() / len(case.tokens) / num_experts
    return Answer(y, table, kept, {"depth": loss})


ORACLES: dict[str, Oracle] = {"base": base, "sinkhorn": sinkhorn, "expert-choice": expert_choice, "mod": mod}
