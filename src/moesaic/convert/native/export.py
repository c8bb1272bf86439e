"""From a sparse model of ours to the family of transformers that computes the same, so that everybody can serve it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.convert.checkpoint.source import Source, open_source
from moesaic.convert.layout.layouts import config_is_ours
from moesaic.convert.native.facts import Homeless, LayerFacts, differing, facts_of
from moesaic.convert.native.fit import choose
from moesaic.convert.native.moving import moving_steps
from moesaic.convert.proof.probe import Batch
from moesaic.convert.run import Converted, convert
from moesaic.convert.steps import Change
from moesaic.core.errors import ConfigError
from moesaic.hf import moe_layers

PROMISE = 1e-5
"""Largest difference of logits that an export allows itself, times the largest logit where that is above 1."""


def export(
    source: str | Path | PreTrainedModel,
    family: str = "auto",
    out: str | Path | None = None,
    *,
    dropless: bool = False,
    probe: str | Tensor | Batch | None = "random",
    shard_bytes: int | None = None,
) -> Converted:
    """Write a model made with :func:`moesaic.sparsify` as the family of transformers that computes the same.

    vLLM, SGLang, llama.cpp and plain transformers read the folder without Moesaic, as far as they know the family. The
    logits of both models are compared.

    Args:
        source: a sparse model, its folder, or a run.
        family: ``model_type`` of the family, or "auto" for the first one that fits.
        out: folder to write, which must not exist; None for a model in memory.
        dropless: leave out a capacity that no family has: rows that it would drop are kept. The difference is measured
            then, and nothing promised.
        probe: what both models read to be compared: "random", token ids, a batch by name, or None to go without.
        shard_bytes: largest size of a file; None for that of the source's largest if it has several, or 5 GB.
    Returns:
        The receipt, and the native model or its folder.
    Raises:
        ConfigError: if no family, or not that one, computes the same; it names the parts that have no home.
        CheckpointError: if the source cannot be read, a tensor is missing, left over or misshapen, or the logits are
            further apart than promised; nothing is left at ``out`` then.
    """
    opened = open_source(source)
    return convert(opened, export_change(opened, family, dropless=dropless), out, probe=probe, shard_bytes=shard_bytes)


def export_change(source: Source, family: str = "auto", *, dropless: bool = False) -> Change:
    """The steps from a sparse model of ours to a native one.

    Raises:
        ConfigError: see :func:`export`.
    """
    if not config_is_ours(source.config):
        raise ConfigError(
            f"export needs a model made with moesaic.sparsify, got {source.where} of type "
            f"{source.config.model_type!r}, which others read as it is."
        )
    facts = _facts(source, dropless=dropless)
    _check_routers(source)
    fit = choose(source, facts, family)
    return Change(
        method=f"export to {fit.home.family}",
        config=fit.config,
        steps=tuple(moving_steps(source, fit.home, fit.target)),
        notes=(*fit.stretches, *_notes(source, facts)),
        promises=PROMISE if facts.capacity is None else None,
    )


def _facts(source: Source, *, dropless: bool) -> LayerFacts:
    """The facts that all layers share.

    Raises:
        ConfigError: if a part has no home anywhere, or the layers differ.
    """
    layers: list[LayerFacts] = []
    for path, layer in moe_layers(source.blueprint.model).items():
        facts = facts_of(cast(nn.Module, layer))
        where = f"{path}, of recipe {source.config.moesaic['recipe']}"
        if isinstance(facts, Homeless):
            raise ConfigError(
                f"No family of transformers has a home for {' and '.join(facts.parts)}, in {where}. Serve the model "
                "with transformers and Moesaic, or sparsify with a recipe that families share."
            )
        if facts.capacity is not None and not dropless:
            raise ConfigError(
                f"No family of transformers has a home for {facts.capacity}, in {where}. Pass dropless=True "
                "(--dropless) to keep the rows that it would drop, which changes the outputs."
            )
        layers.append(facts)
    unlike = differing(layers)
    if unlike:
        raise ConfigError(
            f"No family of transformers has a home for MoE layers that differ in {', '.join(unlike)}. "
            "Export a model whose MoE layers are alike."
        )
    return layers[0]


def _check_routers(source: Source) -> None:
    """A router of zeros chooses by how ties are broken, which families do in their own ways."""
    for path in moe_layers(source.blueprint.model):
        name = f"{path}.moe.router.weight"
        if not torch.any(source.read(name)):
            raise ConfigError(
                f"export needs routers that tell experts apart, got {name} with all weights 0, where every expert "
                "ties. Train the model first."
            )


def _notes(source: Source, facts: LayerFacts) -> Iterator[str]:
    if facts.capacity is not None:
        yield f"left out: {facts.capacity}; rows that it dropped are kept"
    yield "balance losses and controllers are for training and do not go along"
    if {info.dtype for info in source.names.values()} & {torch.bfloat16, torch.float16}:
        yield "our router computes in float32; the family's may compute in the model's type, and choose otherwise"
