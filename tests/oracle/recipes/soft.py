"""Nothing is chosen: experts work on mixtures of tokens, or are mixed themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.experts import feed_forward
from tests.oracle.router import Row, Table, best, softmax


def all_rows(table: Table, token: int, weights: list[Tensor]) -> None:
    """A row for each expert, the largest weight first."""
    order = best([weight.item() for weight in weights], len(weights))
    for choice, expert in enumerate(order):
        table.rows.append(Row(token=token, choice=choice, expert=expert, weight=weights[expert]))


def sequences_of(case: Case) -> list[list[int]]:
    """The tokens of each sequence that holds one, padding left out, sequences by rising name."""
    names = sorted({case.sequences[t] for t in case.tokens})
    return [[t for t in case.tokens if case.sequences[t] == name] for name in names]


def zeros(num_experts: int) -> list[Tensor]:
    return [torch.zeros((), dtype=torch.float64) for _ in range(num_experts)]


def answer(case: Case, y: list[Tensor], table: Table, losses: dict[str, Tensor] | None = None) -> Answer:
    """Every row of a token that is no padding is kept."""
    kept = [case.valid[row.token] for row in table.rows]
    return Answer(torch.stack(y) if y else case.x * 1, table, kept, losses or {})


def unit(vector: Tensor) -> Tensor:
    return vector / ((vector * vector).sum() + 1e-6).sqrt()


def soft_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Slots are softmaxes over a sequence's tokens, tokens softmaxes over all slots."""
    num_experts = options["num_experts"]
    phi, scale = weights["slot_DES"], weights["scale"]
    slots = [(e, s) for e in range(num_experts) for s in range(phi.shape[2])]
    logits = [
        {(e, s): scale * (unit(case.x[t]) * unit(phi[:, e, s])).sum() for e, s in slots} for t in range(len(case.valid))
    ]
    combine = [dict(zip(slots, softmax(list(line.values())), strict=True)) for line in logits]
    y = [case.x[t] * 0 for t in range(len(case.valid))]
    for tokens in sequences_of(case):
        for slot in slots:
            dispatch = softmax([logits[t][slot] for t in tokens])
            mixed = sum(share * case.x[t] for share, t in zip(dispatch, tokens, strict=True))
            up, down = weights["experts.up_EDF"][slot[0]], weights["experts.down_EFD"][slot[0]]
            made = feed_forward(mixed, None, up, down, options.get("activation", "gelu"))
            for t in tokens:
                y[t] = y[t] + combine[t][slot] * made
    table = Table()
    for t, is_valid in enumerate(case.valid):
        table.logits.append([sum(logits[t][e, s].exp() for s in range(phi.shape[2])).log() for e in range(num_experts)])
        table.scores.append([sum(combine[t][e, s] for s in range(phi.shape[2])) for e in range(num_experts)])
        all_rows(table, t, table.scores[t] if is_valid else zeros(num_experts))
    return answer(case, y, table)


def normal(vector: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Layer normalisation."""
    gap = vector - vector.sum() / len(vector)
    return gap / ((gap * gap).sum() / len(vector) + 1e-5).sqrt() * gain + shift


def merged(weights: Weights, name: str, shares: list[Tensor]) -> Tensor:
    """The average of a stack of weights."""
    return sum(share * weights[f"experts.{name}"][e] for e, share in enumerate(shares))


def run_spans(
    case: Case,
    weights: Weights,
    num_experts: int,
    activation: str,
    spans: list[tuple[list[int], list[Tensor], list[Tensor]]],
) -> Answer:
    """Each span (tokens, logits, shares) through the network that its shares merge."""
    y = [case.x[t] * 0 for t in range(len(case.valid))]
    logits = [zeros(num_experts) for _ in case.valid]
    share_of = [zeros(num_experts) for _ in case.valid]
    for tokens, span_logits, shares in spans:
        gate = merged(weights, "gate_EDF", shares) if "experts.gate_EDF" in weights else None
        up, down = merged(weights, "up_EDF", shares), merged(weights, "down_EFD", shares)
        for t in tokens:
            y[t] = feed_forward(case.x[t], gate, up, down, activation)
            logits[t], share_of[t] = span_logits, shares
    table = Table(logits=logits, scores=[softmax(line) for line in logits])
    for t in range(len(case.valid)):
        all_rows(table, t, share_of[t])
    return answer(case, y, table)


def smear(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Each sequence is routed by the mean of its tokens; both sides of the router are normalised."""
    num_experts = options["num_experts"]
    spans = []
    for tokens in sequences_of(case):
        mean = sum(case.x[t] for t in tokens) / len(tokens)
        mean = normal(mean, weights["router.input_norm.weight"], weights["router.input_norm.bias"])
        gain, shift = weights["router.weight_norm.weight"], weights["router.weight_norm.bias"]
        logits = [(mean * normal(weights["router.weight"][e], gain, shift)).sum() for e in range(num_experts)]
        spans.append((tokens, logits, softmax(logits)))
    return run_spans(case, weights, num_experts, options.get("activation", "silu"), spans)


def lory(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Each segment is routed by the mean of the one before; the first by its own, without gradient."""
    num_experts, length = options["num_experts"], options.get("segment", 256)
    spans = []
    for tokens in sequences_of(case):
        segments = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        for index, segment in enumerate(segments):
            source = segments[max(index - 1, 0)]
            mean = sum(case.x[t] for t in source) / len(source)
            logits = [(mean * weights["router.weight"][e]).sum() for e in range(num_experts)]
            shares = softmax(logits)
            spans.append((segment, logits, [share.detach() for share in shares] if index == 0 else shares))
    return run_spans(case, weights, num_experts, options.get("activation", "silu"), spans)


ORACLES: dict[str, Oracle] = {"soft-moe": soft_moe, "smear": smear, "lory": lory}
