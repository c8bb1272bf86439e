"""Adaptive numbers of experts, other scores, dense and annealed gates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.oracle import balance, dispatch, experts
from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.router import SCORES, Row, Table, best, softmax


def _dot(x: Tensor, weight: Tensor) -> list[Tensor]:
    return [(x * weight[e]).sum() for e in range(weight.shape[0])]


def _add_by_weight(table: Table, token: int, chosen: list[int], weights: list[Tensor]) -> None:
    """Rows of one token: the largest weight first, of equal ones the lowest expert."""
    for choice, e in enumerate(sorted(chosen, key=lambda e: (-weights[e].item(), e))):
        table.rows.append(Row(token=token, choice=choice, expert=e, weight=weights[e]))


def _answer(case: Case, weights: Weights, options: dict[str, Any], table: Table, activation: str, **losses: Tensor):
    """Nothing is dropped; experts are gated if the layer has gates."""
    kept = dispatch.keep_all(table, case.valid)
    stacks = (weights.get("experts.gate_EDF"), weights["experts.up_EDF"], weights["experts.down_EFD"])
    y = experts.combine(case.x, table, kept, *stacks, options.get("activation", activation))
    return Answer(y, table, kept, losses)


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def _entropy(probabilities: list[Tensor]) -> Tensor:
    return sum((-p * p.log() for p in probabilities if p.item() > 0), start=_zero())


def _mean_entropy(table: Table, tokens: list[int]) -> Tensor:
    return sum((_entropy(table.scores[t]) for t in tokens), start=_zero()) / max(len(tokens), 1)


def top_p(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """The fewest of the most probable experts that reach p together."""
    table, p = Table(), options.get("top_p", 0.4)
    most = options.get("top_k", options["num_experts"])
    for t in range(case.x.shape[0]):
        logits = _dot(case.x[t], weights["router.weight"])
        probabilities = softmax(logits)
        chosen: list[int] = []
        for e in best([value.item() for value in probabilities], most):
            chosen.append(e)
            if sum(probabilities[taken].item() for taken in chosen) >= p:
                break
        _add_by_weight(table, t, chosen, probabilities)
        table.logits.append(logits)
        table.scores.append(probabilities)
    losses = {"switch": balance.switch(table, case.tokens), "entropy": _mean_entropy(table, case.tokens)}
    return _answer(case, weights, options, table, "silu", **losses)


def relu(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Every expert of positive logit; the logit weighs."""
    table = Table()
    for t in range(case.x.shape[0]):
        logits = _dot(case.x[t], weights["router.weight"])
        gates = [logit if logit.item() > 0 else 0 * logit for logit in logits]
        _add_by_weight(table, t, [e for e, gate in enumerate(gates) if gate.item() > 0], gates)
        table.logits.append(logits)
        table.scores.append(gates)
    num_experts, num_tokens = options["num_experts"], len(case.tokens)
    loss = _zero()
    for e in range(num_experts):
        active = sum(table.scores[t][e].item() > 0 for t in case.tokens)
        loss = loss + sum((table.scores[t][e] for t in case.tokens), start=_zero()) * active
    if num_tokens:
        loss = loss * num_experts / (options["top_k"] * num_tokens**2)
    return _answer(case, weights, options, table, "silu", l1=loss)


def cosine(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """The expert whose embedding makes the least angle with the projected token."""
    table = Table()
    score = options.get("score", "softmax")
    temperature = weights["router.log_temperature"].exp()
    embeddings = weights["router.embedding_ER"]
    lengths = [sum(value**2 for value in embeddings[e]).sqrt() for e in range(options["num_experts"])]
    for t in range(case.x.shape[0]):
        point = _dot(case.x[t], weights["router.weight"])
        length = sum(value**2 for value in point).sqrt()
        cosines = [
            sum(a * b for a, b in zip(point, embeddings[e], strict=True)) / (length * lengths[e])
            for e in range(options["num_experts"])
        ]
        logits = [value / temperature for value in cosines]
        scores = SCORES[score](logits)
        for choice, e in enumerate(best([value.item() for value in cosines], options["top_k"])):
            table.rows.append(Row(token=t, choice=choice, expert=e, weight=scores[e]))
        table.logits.append(logits)
        table.scores.append(scores)
    return _answer(case, weights, options, table, "gelu", switch=balance.switch(table, case.tokens))


def attention(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Experts look at each other; the K of largest output, weighted by a softmax over these."""
    table, num_experts = Table(), options["num_experts"]
    for t in range(case.x.shape[0]):
        numbers = _dot(case.x[t], weights["router.weight"])
        queries, keys, values = (numbers[i * num_experts : (i + 1) * num_experts] for i in range(3))
        outputs = []
        for query in queries:
            looks = softmax([query * key for key in keys])
            outputs.append(sum(look * value for look, value in zip(looks, values, strict=True)))
        chosen = best([value.item() for value in outputs], options["top_k"])
        shares = softmax([outputs[e] for e in chosen])
        for choice, (e, share) in enumerate(zip(chosen, shares, strict=True)):
            table.rows.append(Row(token=t, choice=choice, expert=e, weight=share))
        table.logits.append(outputs)
        table.scores.append(softmax(outputs))
    return _answer(case, weights, options, table, "silu")


def _dense_table(case: Case, weights: Weights, most: int, threshold: float) -> Table:
    table = Table()
    for t in range(case.x.shape[0]):
        logits = _dot(case.x[t], weights["router.weight"])
        probabilities = softmax(logits)
        ranked = best([value.item() for value in probabilities], most)
        chosen = [e for place, e in enumerate(ranked) if place == 0 or probabilities[e].item() > threshold]
        _add_by_weight(table, t, chosen, probabilities)
        table.logits.append(logits)
        table.scores.append(probabilities)
    return table


def dense(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """All experts, weighted by a softmax."""
    table = _dense_table(case, weights, options["num_experts"], -1.0)
    return _answer(case, weights, options, table, "relu")


def ds_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """All experts in training, a few in evaluation, and the loss that makes a few enough."""
    most, threshold = options["num_experts"], -1.0
    if not case.training:
        most, threshold = options["top_k"], options.get("threshold", 0.0)
    table = _dense_table(case, weights, most, threshold)
    means = [
        sum((table.scores[t][e] for t in case.tokens), start=_zero()) / max(len(case.tokens), 1)
        for e in range(options["num_experts"])
    ]
    loss = _mean_entropy(table, case.tokens) - _entropy(means)
    return _answer(case, weights, options, table, "silu", **{"mutual-information": loss})


def evo_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Shares of a softmax with Gumbel noise, over a temperature; those above a threshold are active."""
    table, num_experts = Table(), options["num_experts"]
    step = int(weights["router.cooled"])
    start, end = options.get("temperature", 2.0), options.get("end_temperature", 0.3)
    done = min(step / options.get("cooling_steps", 10_000), 1.0)
    linear = options.get("cooling", "exponential") == "linear"
    temperature = start - done * (start - end) if linear else start * math.exp(math.log(end / start) * done)
    temperature = torch.tensor(temperature, dtype=torch.float32).item()  # kept in float32
    hard = options.get("hard_after") is not None and step >= options["hard_after"]
    if case.training:
        noise = -torch.empty(case.x.shape[0], num_experts, dtype=torch.float64).exponential_().log()
    most = 1 if hard else num_experts if case.training else options["top_k"]
    for t in range(case.x.shape[0]):
        logits = _dot(case.x[t], weights["router.weight"])
        noisy = [logit + noise[t, e] for e, logit in enumerate(logits)] if case.training else logits
        shares = softmax([value / temperature for value in noisy])
        ranked = best([value.item() for value in shares], most)
        chosen = [
            e for place, e in enumerate(ranked) if place == 0 or shares[e].item() > options.get("threshold", 0.001)
        ]
        _add_by_weight(table, t, chosen, shares)
        table.logits.append(logits)
        table.scores.append(shares)
    loss = _zero()
    for e in range(num_experts):
        gates = [row.weight for row in table.rows if row.expert == e and case.valid[row.token]]
        num_tokens = max(len(case.tokens), 1)
        loss = loss + num_experts * (sum(gates, start=_zero()) / num_tokens) * (len(gates) / num_tokens)
    return _answer(case, weights, options, table, "gelu", **{"active-share": loss})


def reinforce(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """K draws without replacement, each the expert whose clock rings first among those left; all weigh the same."""
    table, num_experts, top_k = Table(), options["num_experts"], options["top_k"]
    if case.training:
        clock = torch.empty(case.x.shape[0], num_experts, dtype=torch.float64).exponential_()
    surprise = _zero()
    mean = sum(case.rewards[t] for t in case.tokens) / max(len(case.tokens), 1)
    for t in range(case.x.shape[0]):
        logits = _dot(case.x[t], weights["router.weight"])
        probabilities = softmax(logits)
        # An exponential clock of rate p_e rings at exponential / p_e; the first of several is e with probability p_e.
        ring = [(clock[t, e] if case.training else 1.0) / probabilities[e].item() for e in range(num_experts)]
        drawn = best([-float(time) for time in ring], top_k)
        left = list(range(num_experts))
        for choice, e in enumerate(drawn):
            table.rows.append(
                Row(token=t, choice=choice, expert=e, weight=torch.tensor(1 / top_k, dtype=torch.float64))
            )
            if case.valid[t]:
                chance = probabilities[e] / sum(probabilities[other] for other in left)
                surprise = surprise - (case.rewards[t] - mean) * chance.log()
            left.remove(e)
        table.logits.append(logits)
        table.scores.append(probabilities)
    losses = {"reinforce": surprise / max(len(case.tokens), 1), "switch": balance.switch(table, case.tokens)}
    return _answer(case, weights, options, table, "gelu", **losses)


ORACLES: dict[str, Oracle] = {
    "dense": dense,
    "evo-moe": evo_moe,
    "reinforce": reinforce,
    "cosine": cosine,
    "top-p": top_p,
    "ds-moe": ds_moe,
    "attention": attention,
    "relu": relu,
}
