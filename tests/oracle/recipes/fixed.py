"""Designs without a router: a table of token ids, a table for each domain, or chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.oracle import dispatch, experts
from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.router import Row, Table


def given(case: Case, chosen: list[list[int]], num_experts: int, weights: Weights, activation: str) -> Answer:
    """Each token goes to the experts given for it, which count the same; scores say just that."""
    table = Table()
    for t, some in enumerate(chosen):
        share = torch.tensor(1 / len(some), dtype=torch.float64)
        nothing = torch.zeros((), dtype=torch.float64)
        for choice, e in enumerate(some):
            table.rows.append(Row(token=t, choice=choice, expert=e, weight=share))
        table.scores.append([share if e in some else nothing for e in range(num_experts)])
        table.logits.append([share.log() if e in some else nothing - 100 for e in range(num_experts)])
    kept = dispatch.keep_all(table, case.valid)
    y: Tensor = experts.combine(
        case.x,
        table,
        kept,
        weights.get("experts.gate_EDF"),
        weights["experts.up_EDF"],
        weights["experts.down_EFD"],
        activation,
    )
    return Answer(y, table, kept, {})


def hash_(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """The expert that the token's id has in the table."""
    table = weights["router.table_V"].tolist()
    return given(
        case, [[table[v]] for v in case.ids], options["num_experts"], weights, options.get("activation", "relu")
    )


def thor(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """One expert drawn for each sequence in training, the mean of all in evaluation."""
    num_experts = options["num_experts"]
    if case.training:
        drawn = torch.randint(num_experts, (max(case.sequences, default=-1) + 1,)).tolist()
        chosen = [[drawn[sequence]] for sequence in case.sequences]
    else:
        chosen = [list(range(num_experts)) for _ in case.sequences]
    return given(case, chosen, num_experts, weights, options.get("activation", "relu"))


def pangu_sigma(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """The expert that the token's id has in the table of its domain."""
    tables = weights["router.table_QV"].tolist()
    num_domains = options.get("num_domains", 4 if options["num_experts"] % 4 == 0 else 1)
    chosen = []
    for domain, v in zip(case.domains, case.ids, strict=True):
        chosen.append([tables[domain if num_domains > 1 else 0][v]])
    return given(case, chosen, options["num_experts"], weights, options.get("activation", "gelu"))


ORACLES: dict[str, Oracle] = {"hash": hash_, "thor": thor, "pangu-sigma": pangu_sigma}
