"""The numbers of the experiment on pretrained weights, and what it found."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import CheckpointError
from moesaic.core.files import replacing_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The numbers that all models of the experiment share.

    Attributes:
        layers: whose feed-forward networks become mixtures, and are trained in every model; the rest is frozen.
        num_experts: copies that upcycling makes, and slices that splitting cuts.
        split_top_k: slices that a token meets after splitting.
        context: tokens of a sequence.
        batch_size: sequences of a step.
        steps: optimizer steps.
        lr: highest learning rate; a cosine takes it to a tenth.
        warmup: steps on which it rises.
        dtype: ``bfloat16`` for autocast, or ``float32``; weights, routers and the optimizer are in float32 always.
        seed: of everything random.
        looks: how often a model is measured on its way, the start included.
        look_bytes: held-out text of each domain that is read then.
        last_bytes: held-out text of each domain that is read before and after.
        calibration_blocks: training sequences that splitting, pruning and merging look at.
        questions: of each set.
    """

    layers: tuple[int, ...] = tuple(range(20, 30))
    num_experts: int = 8
    split_top_k: int = 4
    context: int = 256
    batch_size: int = 8
    steps: int = 60
    lr: float = 5e-4
    warmup: int = 5
    dtype: str = "bfloat16"
    seed: int = 0
    looks: int = 4
    look_bytes: int = 12_000
    last_bytes: int = 50_000
    calibration_blocks: int = 32
    questions: int = 120

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.context

    @property
    def trainable(self) -> str:
        """The regular expression for what is trained: the same networks, whether dense or experts; no router."""
        return rf"layers\.({'|'.join(map(str, self.layers))})\.mlp\.(?!moe\.router)"

    @property
    def look_steps(self) -> tuple[int, ...]:
        """After which steps a model is measured."""
        return tuple(round(self.steps * look / (self.looks - 1)) for look in range(self.looks))


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What the experiment found, as far as it has come. Models go by what they are, as in ``upcycled, trained``.

    Attributes:
        plan: the numbers.
        source: the dense model, in words.
        machine: that it ran on.
        receipts: of each conversion of the dense model: largest logit difference and what else it says.
        sizes: parameters of each model, all and active, and tokens per second of its training.
        looks: of each model on the way: (tokens read, bits per byte by domain, bits of each document).
        looked_at: domain and bytes of each held-out document that is read on the way.
        documents: the same of those that are read before and after.
        bits: of each of the documents read before and after, by model.
        answers: by set of questions and model, a 1 for each question answered rightly and a 0 for each other.
        smaller: bits of each document read on the way for each step of making a mixture smaller, by what was done.
    """

    plan: Plan
    source: str
    machine: str
    receipts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    looks: Mapping[str, Any] = field(default_factory=dict)
    looked_at: tuple[tuple[str, int], ...] = ()
    documents: tuple[tuple[str, int], ...] = ()
    bits: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    answers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    smaller: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def with_(self, what: str, name: str, value: Any) -> Story:
        """The same with one more entry in one of its tables."""
        changed: Any = {what: {**getattr(self, what), name: value}}
        return replace(self, **changed)

    def save(self, path: Path) -> Path:
        """Write it as JSON, whole or not at all."""
        with replacing_file(path) as file:
            file.write((json.dumps(asdict(self), indent=None, separators=(",", ":")) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: Path) -> Story:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: if it is not there, or something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            plan = values.pop("plan")
            plan["layers"] = tuple(plan["layers"])
            for name in ("documents", "looked_at"):
                values[name] = tuple((domain, int(size)) for domain, size in values[name])
            for name in ("bits", "smaller"):
                values[name] = {key: tuple(several) for key, several in values[name].items()}
            known = {item.name for item in fields(cls)}
            assert set(values) <= known
            return cls(plan=Plan(**plan), **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise CheckpointError(
                f"The figures of the experiment could not be read from {path}: {error}. Start anew in another folder."
            ) from error


def this_machine() -> str:
    """The processor, the number of its cores, and torch's version."""
    return f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
