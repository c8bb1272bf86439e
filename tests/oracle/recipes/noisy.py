"""Noisy gates and their kin of 2017, and LLaMA-MoE, which took them up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.oracle import balance, dispatch, experts
from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.router import Row, Table, best, softmax


def _dot(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).sum()


def _softplus(value: Tensor) -> Tensor:
    return (1 + value.exp()).log()


def _normal_below(value: Tensor) -> Tensor:
    """How likely a standard normal number is below the value."""
    return (1 + torch.erf(value / math.sqrt(2))) / 2


class _Gate:
    """One noisy gate for one token: who is kept, at which weight, and who was how likely to be."""

    def __init__(self, clean: list[Tensor], spreads: list[Tensor], drawn: list[float] | None, top_k: int) -> None:
        self.noisy = clean
        if drawn is not None:
            self.noisy = [c + s * d for c, s, d in zip(clean, spreads, drawn, strict=True)]
        self.chosen = best([value.item() for value in self.noisy], top_k)
        self.weights = dict(zip(self.chosen, softmax([self.noisy[e] for e in self.chosen]), strict=True))
        self.likely = [torch.tensor(float(e in self.chosen), dtype=torch.float64) for e in range(len(clean))]
        if drawn is not None and top_k < len(clean):
            for e in range(len(clean)):
                others = [self.noisy[other] for other in range(len(clean)) if other != e]
                rival = others[best([value.item() for value in others], top_k)[-1]]  # the K-th largest without e
                self.likely[e] = _normal_below((clean[e] - rival) / spreads[e])


def _draw(case: Case, count: int) -> list[list[float]] | None:
    """The noise of every token for one gate of so many experts, or None in evaluation."""
    return torch.randn(len(case.valid), count, dtype=torch.float64).tolist() if case.training else None


def _run(case: Case, table: Table, load: list[Tensor], weights: Weights, activation: str) -> Answer:
    kept = dispatch.keep_all(table, case.valid)
    gate = weights.get("experts.gate_EDF")
    y = experts.combine(case.x, table, kept, gate, weights["experts.up_EDF"], weights["experts.down_EFD"], activation)
    losses = {"importance": balance.importance(table, case.tokens), "load": balance.squared_variation(load)}
    return Answer(y, table, kept, losses)


def _flat(case: Case, weights: Weights, *, top_k: int, epsilon: float, scale: float, activation: str) -> Answer:
    weight, noise, mix = weights["router.weight"], weights["router.noise_ED"], weights.get("router.mix_EE")
    num_experts = weight.shape[0]
    drawn = _draw(case, num_experts)
    table, load = Table(), [torch.zeros((), dtype=torch.float64) for _ in range(num_experts)]
    for t in range(len(case.valid)):
        clean = [_dot(case.x[t], weight[e]) for e in range(num_experts)]
        if mix is not None:
            hidden = [torch.tanh(value) for value in clean]
            clean = [sum(hidden[i] * mix[e, i] for i in range(num_experts)) for e in range(num_experts)]
        spreads = [_softplus(_dot(case.x[t], noise[e])) + epsilon for e in range(num_experts)]
        gate = _Gate(clean, spreads, drawn and drawn[t], top_k)
        for choice, e in enumerate(gate.chosen):
            table.rows.append(Row(t, choice, e, gate.weights[e] * scale))
        table.logits.append(clean)
        table.scores.append(softmax(gate.noisy))
        if case.valid[t]:
            load = [total + likely for total, likely in zip(load, gate.likely, strict=True)]
    return _run(case, table, load, weights, activation)


def shazeer_2017(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Noisy top-k."""
    return _flat(
        case,
        weights,
        top_k=options["top_k"],
        epsilon=options.get("noise_epsilon", 0.0),
        scale=1.0,
        activation=options.get("activation", "relu"),
    )


def llama_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Noisy top-k behind a gate with a hidden layer, weights scaled up by E / K."""
    return _flat(
        case,
        weights,
        top_k=options["top_k"],
        epsilon=options.get("noise_epsilon", 0.01),
        scale=options.get("scale", options["num_experts"] / options["top_k"]),
        activation=options.get("activation", "silu"),
    )


def hierarchical_2017(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """A noisy gate over groups, and one in each group; weights and loads multiply."""
    group_weight, group_noise = weights["router.group_GD"], weights["router.group_noise_GD"]
    weight, noise = weights["router.weight"], weights["router.noise_ED"]
    num_groups, num_experts = group_weight.shape[0], weight.shape[0]
    size, top_k, epsilon = num_experts // num_groups, options["top_k"], options.get("noise_epsilon", 0.0)
    group_drawn, drawn = _draw(case, num_groups), _draw(case, num_experts)

    zero = torch.zeros((), dtype=torch.float64)
    table, group_load, visits = Table(), [zero] * num_groups, [0] * num_groups
    member_load = [zero] * num_experts
    for t in range(len(case.valid)):
        x = case.x[t]
        group_clean = [_dot(x, group_weight[g]) for g in range(num_groups)]
        group_spreads = [_softplus(_dot(x, group_noise[g])) + epsilon for g in range(num_groups)]
        primary = _Gate(group_clean, group_spreads, group_drawn and group_drawn[t], 1 if num_groups == 1 else top_k)
        found, logits, scores = [], [], []
        group_scores = softmax(primary.noisy)
        for g in range(num_groups):
            members = range(g * size, (g + 1) * size)
            clean = [_dot(x, weight[e]) for e in members]
            spreads = [_softplus(_dot(x, noise[e])) + epsilon for e in members]
            gate = _Gate(clean, spreads, drawn and [drawn[t][e] for e in members], top_k)
            logits += [group_clean[g] + share.log() for share in softmax(clean)]
            scores += [group_scores[g] * share for share in softmax(gate.noisy)]
            if g not in primary.chosen:
                continue
            found += [(members[i], primary.weights[g] * gate.weights[i]) for i in gate.chosen]
            if case.valid[t]:
                visits[g] += 1
                for i in range(size):
                    member_load[members[i]] = member_load[members[i]] + gate.likely[i]
        found.sort(key=lambda pair: (-pair[1].item(), pair[0]))
        table.rows += [Row(t, choice, e, value) for choice, (e, value) in enumerate(found)]
        table.logits.append(logits)
        table.scores.append(scores)
        if case.valid[t]:
            group_load = [total + likely for total, likely in zip(group_load, primary.likely, strict=True)]
    load = [group_load[e // size] * member_load[e] / max(visits[e // size], 1) for e in range(num_experts)]
    return _run(case, table, load, weights, options.get("activation", "relu"))


def strictly_balanced_2017(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Experts keep their best tokens of the batch in training, those above a threshold in evaluation."""
    weight, thresholds = weights["router.weight"], weights["router.threshold_E"]
    num_experts, table = weight.shape[0], Table()
    for t in range(len(case.valid)):
        table.logits.append([_dot(case.x[t], weight[e]) for e in range(num_experts)])
        table.scores.append(softmax(table.logits[t]))
    chosen: list[set[int]] = [set() for _ in case.valid]
    for e in range(num_experts):
        if case.training:
            room = min(len(case.tokens), max(1, options["top_k"] * len(case.tokens) // num_experts))
            for place in best([table.scores[t][e].item() for t in case.tokens], room):
                chosen[case.tokens[place]].add(e)
        else:
            for t in range(len(case.valid)):
                if table.scores[t][e].item() > thresholds[e].item():
                    chosen[t].add(e)
    for t, taken in enumerate(chosen):
        total = sum(table.scores[t][e] for e in taken)
        for choice, e in enumerate(sorted(taken, key=lambda e: (-table.scores[t][e].item(), e))):
            table.rows.append(Row(t, choice, e, table.scores[t][e] / total))
    kept = dispatch.keep_all(table, case.valid)
    up, down = weights["experts.up_EDF"], weights["experts.down_EFD"]
    y = experts.combine(case.x, table, kept, None, up, down, options.get("activation", "relu"))
    loss = torch.zeros((), dtype=torch.float64)
    for t in case.tokens:
        for e in range(num_experts):
            gap = table.scores[t][e] - thresholds[e]
            loss = loss + ((gap.item() > 0) - (e in chosen[t])) * gap / len(case.tokens)
    return Answer(y, table, kept, {"threshold": loss})


ORACLES: dict[str, Oracle] = {
    "shazeer-2017": shazeer_2017,
    "hierarchical-2017": hierarchical_2017,
    "strictly-balanced-2017": strictly_balanced_2017,
    "llama-moe": llama_moe,
}
