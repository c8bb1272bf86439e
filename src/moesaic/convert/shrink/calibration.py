"""One pass over some text that tells what each expert was worth, from what the routers really decided."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.convert.checkpoint.source import Source
from moesaic.convert.layout.layouts import MoELayout
from moesaic.convert.progress import tracked
from moesaic.convert.shrink.saliency import ExpertStats
from moesaic.convert.shrink.watch import watching
from moesaic.core.errors import ConfigError

Batch = Mapping[str, Any] | Tensor


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, batches: Iterable[Batch], *, every_expert: bool = False, max_tokens: int | None = None
) -> dict[str, ExpertStats]:
    """Run a model over some text and sum up what its experts do, layer by layer.

    Choices and weights are those that the layer used: they are read where they enter the experts, after groups, biases,
    normalisation, scaling and capacity, and never worked out a second time. Each expert's output is what the experts
    return for the row alone with weight 1, so that biases, clamps and layouts of any family are in it. (A number that a
    block multiplies its whole output by afterwards, as MiniMax-M3 does, is not: it ranks no expert.)

    Args:
        model: one of ours, or a mixture of transformers, which runs adopted, on our kernels, for the time.
        batches: what the model is called with: ``input_ids`` alone, or keyword arguments; ``labels`` and what the
            model does not take are left out. Padding that ``attention_mask`` names counts for nothing.
        every_expert: also let every expert work on every token, for means and distances of outputs that do not depend
            on who served whom; costs E / K times the experts' work.
        max_tokens: stop after this many tokens that are no padding.
    Returns:
        Statistics by the module path of the layer's experts, in depth order, of the layers that ran.
    Raises:
        ConfigError: if the model has no experts that can be looked at, :func:`moesaic.adopt` refuses it, or there are
            no batches.
    """
    was_training = {part: part.training for part in model.modules()}
    model.train(False)
    seen = 0
    try:
        with watching(model, every_expert=every_expert) as watches:
            for batch in tracked(batches, "looking at experts", _length(batches)):
                inputs = model_inputs(model, batch)
                seen += _num_tokens(inputs)
                model(**inputs)
                watches.settle()
                if max_tokens is not None and seen >= max_tokens:
                    break
    finally:
        for part, training in was_training.items():
            part.training = training
    if not seen:
        raise ConfigError(
            "calibrate needs at least one batch with tokens, got none. Give some text of the model's use."
        )
    return watches.results()


def statistics(
    source: Source,
    layouts: Mapping[str, MoELayout],
    *,
    batches: Iterable[Batch] | None,
    stats: Mapping[str, ExpertStats] | None,
    what: str,
    every_expert: bool = False,
    max_tokens: int | None = None,
) -> Mapping[str, ExpertStats]:
    """Those that were given, or those of a pass over the text.

    Args:
        source: the checkpoint; a folder is read into memory for the pass and let go.
        layouts: the layers that they are needed for, by the path of their experts.
        batches: text.
        stats: what :func:`calibrate` gave before.
        what: who asks, for messages.
        every_expert: see :func:`calibrate`.
        max_tokens: see there.
    Raises:
        ConfigError: if there is neither, or they belong to another model.
    """
    if stats is None:
        if batches is None:
            raise ConfigError(
                f"{what} needs text to see what experts do, or statistics, got neither. "
                "Pass batches, or the result of moesaic.convert.calibrate as stats."
            )
        model = source.model or load(source)
        stats = calibrate(model, batches, every_expert=every_expert, max_tokens=max_tokens)
    for path, layout in layouts.items():
        if path not in stats or stats[path].num_experts != layout.num_experts:
            found = f"{stats[path].num_experts} experts" if path in stats else "nothing"
            raise ConfigError(
                f"{what} needs statistics of {layout.num_experts} experts at {path}, got {found}. "
                "Calibrate the model that is converted."
            )
    return stats


def load(source: Source) -> PreTrainedModel:
    """The model of a folder, in memory, in the type that it is stored in."""
    model_class: Any = type(source.blueprint.model)
    model: PreTrainedModel = model_class.from_pretrained(str(source.folder), dtype="auto", local_files_only=True)
    model.train(False)
    return model


def _length(batches: Iterable[Batch]) -> int:
    """How many batches there are; 0 where that shows only at the end."""
    return len(batches) if isinstance(batches, Sized) else 0


def _num_tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch that are no padding."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return int((mask != 0).sum())
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return 1 if ids is None else int(ids.shape[0] * ids.shape[1])


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What a model takes of a batch, where the model is; without labels."""
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    takes = inspect.signature(model.forward).parameters
    kept = {name: value for name, value in given.items() if name in takes and name != "labels"}
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in kept.items()}
