"""Tiny models to examine, text for them, and the verdicts of a report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import moesaic as mz
from moesaic.doctor import Report, examine
from tests.hf import tiny


def patient(recipe: str = "mixtral", **options: Any) -> PreTrainedModel:
    """A sparse model with random weights, as training begins with it."""
    torch.manual_seed(0)
    dense = tiny.build("llama", initializer_range=0.3)
    return mz.sparsify(dense, recipe, hidden=16, init_std=0.3, **{**tiny.OPTIONS[recipe], **options})


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    """Random tokens with labels."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(3, tiny.VOCABULARY, (6, 32), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


def examined(model: PreTrainedModel, **options: Any) -> Report:
    """The report on a model, run on random tokens."""
    return examine(model, batches=batches(), **options)


def verdicts(report: Report) -> dict[str, str]:
    """Verdict by check."""
    return {finding.name: finding.verdict for finding in report.findings}


def complaints(report: Report) -> dict[str, str]:
    """What was found sick or of concern, by check."""
    return {name: verdict for name, verdict in verdicts(report).items() if verdict in ("sick", "warning")}
