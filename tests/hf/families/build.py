"""From a family's name to its tiny model."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tests.hf.families.borrowed import BORROWED
from tests.hf.families.composite import COMPOSITE
from tests.hf.families.language import LANGUAGE
from tests.hf.families.sizes import config_of
from tests.hf.families.variants import VARIANTS
from tests.hf.families.weights import random_model

TABLE = LANGUAGE | COMPOSITE | BORROWED


@dataclass(frozen=True)
class Tiny:
    """A model in evaluation mode, float32, and what ``model(**inputs)`` takes."""

    family: str
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    can_generate: bool
    num_layers_moe: int


def tiny(name: str, *, seed: int = 0, **config_changes: Any) -> Tiny:
    """Build a tiny model with random weights; equal arguments give equal models and inputs, each call its own.

    Args:
        name: of a family, or of a variant (``"deepseek_v3/groups"``).
        config_changes: fields of its config, or of the config inside it that speaks of experts.
    """
    return built(name, seed, **config_changes) if config_changes else copy.deepcopy(_kept(name, seed))


@cache
def _kept(name: str, seed: int) -> Tiny:
    """Copies are several times quicker than building anew."""
    return built(name, seed)


def built(name: str, seed: int, **config_changes: Any) -> Tiny:
    """As :func:`tiny`, from nothing."""
    family, _, _ = name.partition("/")
    entry = TABLE.get(name, TABLE[family])
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    architecture = getattr(module, entry.architecture)
    kind = architecture.config_class
    changes = merged(entry.changes, placed(kind, entry.home, VARIANTS.get(name, {}) | config_changes))
    model = random_model(lambda: architecture(config_of(kind, changes)), seed)
    return Tiny(name, model, entry.inputs(model, seed), bool(model.can_generate()), entry.num_layers_moe)


def placed(kind: type[PreTrainedModel], home: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Send what the config itself does not know to the config inside it."""
    if home is None:
        return dict(changes)
    fields = {field.name for field in dataclasses.fields(kind)}
    outside = {name: value for name, value in changes.items() if name in fields}
    inside = {name: value for name, value in changes.items() if name not in fields}
    return merged(outside, {home: inside})


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second winning; a dict in both is merged likewise."""
    both = dict(first)
    for name, value in second.items():
        old = both.get(name)
        both[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both
