"""Small language models: trained from scratch, or dense at first and then changed by low-rank experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from moesaic.lab.small import (
    TWIN,
    Outcome,
    Setup,
    changed_options,
    fit,
    hidden_of_equal_activity,
    measured,
    options_of,
    train_config,
)
from moesaic.lora import MoLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moesaic.train.material import Material

# Where a model goes on, it reads the text in another order than before.
_SECOND_ORDER = 1000


def run(name: str, seed: int, setup: Setup) -> Outcome:
    """Train one recipe, or the dense twin, from scratch, and measure it.

    Args:
        name: of the recipe, or ``twin``.
        seed: of everything random.
        setup: the numbers.
    Raises:
        ConfigError: if the recipe cannot be built that small.
    """
    model, tokens_per_s = trained(name, seed, setup)
    return Outcome(
        kind="text",
        recipe=name,
        seed=seed,
        tokens_per_s=tokens_per_s,
        hidden=setup.active_hidden if name == TWIN else hidden_of_equal_activity(name, setup),
        options={} if name == TWIN else changed_options(name, setup),
        **measured(model, lambda: bits_per_byte(model, setup), setup),
    )


def run_adapted(name: str, seed: int, setup: Setup) -> Outcome:
    """Train the dense twin, put low-rank experts around its feed-forward networks, train those for as long again.

    All else is frozen, as published. ``twin`` goes on as it is, with all of its weights.

    Args:
        name: of a recipe of low-rank experts, or ``twin``.
        seed: of everything random.
        setup: the numbers, for each of the two halves.
    """
    from moesaic.hf import moe_layers, sparsify
    from moesaic.train.order import collate_with_domains

    model, _ = trained(TWIN, seed, setup)
    if name != TWIN:
        model = sparsify(model, name, **options_of(name, setup))
        layers = cast(Iterable[nn.Module], moe_layers(model).values())
        _draw_composed(model)
        own = {id(parameter) for layer in layers for parameter in layer.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)
    blocks = material_of(setup).blocks
    data_seed = seed + _SECOND_ORDER
    tokens_per_s = fit(model, blocks, setup, seed=seed, data_seed=data_seed, collate=collate_with_domains)
    return Outcome(
        kind="adapted",
        recipe=name,
        seed=seed,
        tokens_per_s=tokens_per_s,
        hidden=setup.active_hidden,
        options={} if name == TWIN else changed_options(name, setup),
        **measured(model, lambda: bits_per_byte(model, setup), setup),
    )


def _draw_composed(model: nn.Module) -> None:
    """MoLE composes LoRAs that were trained before; there are none here, and from zeros no gradient would reach any."""
    for layer in model.modules():
        if isinstance(layer, MoLE):
            for low_rank in (layer.experts.gate, layer.experts.up, layer.experts.down):
                largest = 1 / math.sqrt(low_rank.out_ERF.shape[1])
                nn.init.uniform_(low_rank.out_ERF, -largest, largest)


def trained(
    name: str,
    seed: int,
    setup: Setup,
    *,
    prepare: Callable[[PreTrainedModel], None] = lambda _model: None,
    **options: Any,
) -> tuple[PreTrainedModel, float]:
    """Train one model from scratch; give it, and tokens per second.

    Args:
        name: of the recipe, or ``twin``.
        seed: of everything random.
        setup: the numbers.
        prepare: changes the untrained model.
        **options: for :func:`moesaic.sparsify`.
    """
    from transformers import set_seed

    from moesaic.train.order import collate_with_domains

    material = material_of(setup)
    set_seed(seed)
    model = build(name, setup, material, **options)
    prepare(model)
    return model, fit(model, material.blocks, setup, seed=seed, collate=collate_with_domains)


def material_of(setup: Setup) -> Material:
    """The text, read once by each process."""
    return _read(setup.backbone, setup.tokenizer, setup.context)


@cache
def _read(backbone: str, tokenizer: str, context: int) -> Material:
    from moesaic.train.material import Material

    setup = Setup(backbone=backbone, tokenizer=tokenizer, context=context)
    return Material.load(train_config(0, setup, Path("unused")))


def build(name: str, setup: Setup, material: Material, **options: Any) -> PreTrainedModel:
    """The untrained model."""
    from moesaic.hf import sparsify
    from moesaic.train.backbone import Backbone

    backbone = Backbone(
        family=setup.backbone,
        width=setup.width,
        layers=setup.layers,
        heads=max(1, setup.width // 32),
        hidden=setup.active_hidden,
        context=setup.context,
        vocab_size=len(material.tokenizer),
        end_token=int(material.tokenizer.eos_token_id),
        init_std=0.02 * max(1.0, math.sqrt(768 / setup.width)),
    )
    model = backbone.build()
    if name == TWIN:
        return model
    return sparsify(model, name, hidden=hidden_of_equal_activity(name, setup), **options_of(name, setup) | options)


def bits_per_byte(model: PreTrainedModel, setup: Setup) -> float:
    """On held-out text, mean over domains."""
    return material_of(setup).evaluator(model).bits_per_byte["mean"]
