"""A conversion is a list of steps over named tensors: each takes some of the source and gives some of the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

Maker = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One layer's worth of a conversion; no more than its tensors are in memory at a time.

    Names and shapes are those of the models' ``state_dict``, however they are stored.

    Attributes:
        takes: source tensors that it consumes.
        gives: target tensors that it produces; none where it drops what it takes.
        run: from the first to the second, by name. It must not change its inputs in place; it may give views of them.
        moments: the same index map for an optimizer's moments, which have the shapes of the weights: copies, slices and
            averages go along, what is new starts at zero. None where nothing of the old moments says anything.
        why: of a step that drops what it takes, the reason, for the receipt.
    """

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    run: Maker
    moments: Maker | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a method does to a checkpoint. Tensors that no step takes are kept as they are, under their names.

    Attributes:
        method: name for the receipt.
        config: of the target.
        steps: what changes.
        notes: facts that the receipt shall tell.
        promises: the largest difference of logits that the method allows itself on any input, times the largest logit
            where that is above 1; None where it promises nothing and the difference is only measured.
    """

    method: str
    config: PreTrainedConfig
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    promises: float | None = None
