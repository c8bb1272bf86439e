"""A configuration with another number of experts, or of experts for each token, whatever it calls them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from moesaic import routers
from moesaic.convert.checkpoint.blueprint import Blueprint
from moesaic.convert.checkpoint.source import Source
from moesaic.convert.layout.layouts import CHOICES, EXPERT_COUNTS, MoELayout, config_is_ours, configs, moe_layouts
from moesaic.core.errors import ConfigError, MoesaicError
from moesaic.hf.native.rows import ROWS
from moesaic.hf.spec import LayerSpec, SparseSpec
from moesaic.layer import MoELayer

_BY_ROWS = (
    routers.AnnealedRouter,
    routers.BatchwiseRouter,
    routers.CosineRouter,
    routers.DenseRouter,
    routers.ExpertChoiceRouter,
    routers.NoisyTopKRouter,
    routers.NormalizedRouter,
    routers.PolicyRouter,
    routers.ReLURouter,
    routers.SampledTopKRouter,
    routers.SinkhornRouter,
    routers.TopKRouter,
    routers.TopPRouter,
)
"""Routers in which each expert has numbers of its own and no other expert's."""

_GROUPS = {"groups": ("num_groups", "num_devices"), "kept": ("groups_kept", "devices_per_token")}
"""What recipes call their groups of experts, and how many of them a token may use."""


def shrinkable(blueprint: Blueprint) -> dict[str, MoELayout]:
    """The MoE layers of a model by the path of their experts, if experts can be taken out of all of them.

    Raises:
        ConfigError: if the model has none, or a router in which an expert is more than a row.
    """
    model, config = blueprint.model, blueprint.model.config
    layouts = {layout.experts: layout for layout in moe_layouts(blueprint).values()}
    if config_is_ours(config):
        _check_ours(model, layouts)
    if not layouts:
        raise ConfigError(
            f"{type(model).__name__} has no MoE layers whose experts can be taken apart: what is needed are stacked "
            "experts beside a router with a row for each. Start from a mixture of experts."
        )
    for path, layout in layouts.items():
        if layout.entangled:
            raise ConfigError(
                f"{layout.entangled[0]} depends on the number of experts in another way than with a row for each: what "
                "of it belongs to which is not known. This model cannot be made smaller."
            )
        if not layout.rows:
            raise ConfigError(
                f"The router beside {path} has no tensor with one row for each expert, as where it also chooses among "
                "shared experts or to skip: which rows to take out is not known. This family cannot be made smaller."
            )
    for name in blueprint.tensors:
        if name.rpartition(".")[2] == "tid2eid":
            raise ConfigError(
                f"Experts are taken out where a router chooses by score, but {name} is a table that sends each token "
                "id to fixed experts. This family cannot be made smaller."
            )
    return layouts


def with_counts(
    source: Source, layouts: Mapping[str, MoELayout], counts: Mapping[str, int], top_k: int | None = None
) -> PreTrainedConfig:
    """A copy of a model's configuration with other numbers of experts.

    Args:
        source: the model as it is.
        layouts: its MoE layers by the path of their experts.
        counts: experts that each shall have, by the same.
        top_k: experts that each token shall visit; None for as many as now.
    Raises:
        ConfigError: if the family cannot have these numbers, or keeps them where they are not known.
    """
    blueprint, config = source.blueprint, copy.deepcopy(source.config)
    if config_is_ours(config):
        _set_ours(config, blueprint, layouts, counts, top_k)
    else:
        _set_native(config, layouts, counts, top_k)
    try:
        with torch.device("meta"):
            made = Blueprint.from_model(type(blueprint.model)(copy.deepcopy(config)))
        after = {layout.experts: layout for layout in moe_layouts(made).values()}
        _check_groups(made.model, after)
    except (MoesaicError, ValueError, TypeError) as error:
        raise ConfigError(f"{config.model_type} cannot be built with these numbers: {error}") from error
    for path, layout in layouts.items():
        reached = after[path].num_experts if path in after else None
        if reached != counts[path] or (top_k is not None and after[path].top_k != top_k):
            raise ConfigError(
                f"{path} was to have {counts[path]} experts and top_k {top_k or layout.top_k}, but a model of the new "
                f"configuration has {reached} and {after[path].top_k if path in after else None}. "
                f"Where {config.model_type} keeps these numbers is not known: it cannot be made smaller."
            )
    _check_shapes(blueprint, made, layouts)
    return config


def check_choices(layouts: Mapping[str, MoELayout], counts: Mapping[str, int]) -> None:
    """See that each token finds as many experts as it visits, in the groups that it may use.

    Raises:
        ConfigError: naming the first layer where it does not.
    """
    for path, layout in layouts.items():
        reach = counts[path] if layout.groups == 1 else counts[path] // layout.groups * layout.groups_kept
        if layout.top_k is not None and layout.top_k > reach:
            where = "" if layout.groups == 1 else f", in {layout.groups_kept} of {layout.groups} groups"
            raise ConfigError(
                f"Each token visits {layout.top_k} experts, and {path} would leave it {reach} to choose from{where}. "
                "Keep more experts, or lower top_k first."
            )


def per_layer(layouts: Mapping[str, MoELayout], wanted: int | float | list[int], what: str) -> dict[str, int]:
    """How many experts each layer is to have.

    Args:
        layouts: the MoE layers by the path of their experts.
        wanted: one number for all, a share of those that a layer has (rounded to what its groups allow), or a number
            for each layer in depth order.
        what: for messages: keep, or merge to.
    Raises:
        ConfigError: if a share is not between 0 and 1, or there are too few or too many numbers.
    """
    if isinstance(wanted, list):
        if len(wanted) != len(layouts):
            raise ConfigError(
                f"A number of experts to {what} for each layer needs {len(layouts)} numbers, got {len(wanted)}. "
                "Give as many as there are MoE layers, in depth order."
            )
        return dict(zip(layouts, wanted, strict=True))
    if isinstance(wanted, float):
        if not 0 < wanted <= 1:
            raise ConfigError(f"A share of experts to {what} must be above 0 and at most 1, got {wanted}. Half is 0.5.")
        return {
            path: max(1, round(wanted * layout.num_experts / layout.groups)) * layout.groups
            for path, layout in layouts.items()
        }
    return dict.fromkeys(layouts, wanted)


def spec_path(blueprint: Blueprint, layout: MoELayout) -> str:
    """The path under which a layer of ours stands in its model's configuration: below the base model."""
    model = blueprint.model
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return layout.block.removeprefix(prefix)


def _check_ours(model: nn.Module, layouts: Mapping[str, MoELayout]) -> None:
    from moesaic.hf.layers import moe_layers

    by_block = {layout.block: layout for layout in layouts.values()}
    for block, layer in moe_layers(model).items():
        router = getattr(layer, "router", None)
        mixes = isinstance(router, routers.NoisyTopKRouter) and router.mix_EE is not None
        if not isinstance(layer, MoELayer) or not isinstance(router, _BY_ROWS) or mixes or block not in by_block:
            raise ConfigError(
                f"Experts can be taken out where each has a row of the router and weights of its own, not of "
                f"{type(layer).__name__} with {type(router).__name__} and "
                f"{type(getattr(layer, 'experts', None)).__name__} at {block}. Use a recipe such as mixtral or olmoe."
            )


def _set_ours(
    config: PreTrainedConfig,
    blueprint: Blueprint,
    layouts: Mapping[str, MoELayout],
    counts: Mapping[str, int],
    top_k: int | None,
) -> None:
    spec = SparseSpec.from_dict(cast(Any, config).moesaic)
    layers: dict[str, LayerSpec] = dict(spec.layers)
    for path, layout in layouts.items():
        where = spec_path(blueprint, layout)
        options = {**layers[where].options, "num_experts": counts[path]}
        for name, value in zip(("groups", "kept"), (layout.groups, layout.groups_kept), strict=True):
            # Where a recipe derives its groups from the number of experts, they must stay what they were.
            options |= {option: value for option in _GROUPS[name] if option in options and layout.groups > 1}
        if top_k is not None:
            options["top_k"] = top_k
        layers[where] = replace(layers[where], options=options)
    cast(Any, config).moesaic = replace(spec, layers=layers).to_dict()


def _set_native(
    config: PreTrainedConfig, layouts: Mapping[str, MoELayout], counts: Mapping[str, int], top_k: int | None
) -> None:
    before = {layout.num_experts for layout in layouts.values()}
    wanted = list(dict.fromkeys(counts.values()))
    for part in configs(config):
        for name in EXPERT_COUNTS:
            value = vars(part).get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value in before:
                if len(wanted) > 1:
                    raise ConfigError(
                        f"A model of type {config.model_type} has one number of experts for all layers, got "
                        f"{', '.join(map(str, counts.values()))}. Give one number."
                    )
                setattr(part, name, wanted[0])
            elif isinstance(value, list) and len(value) == len(counts):
                setattr(part, name, list(counts.values()))
        for name in CHOICES if top_k is not None else ():
            value = vars(part).get(name)
            if isinstance(value, int):
                setattr(part, name, top_k)
            elif isinstance(value, list):
                setattr(part, name, [top_k] * len(value))


def _check_groups(model: nn.Module, layouts: Mapping[str, MoELayout]) -> None:
    """Try the limits of routers that choose among groups, which their own classes do not check."""
    for layout in layouts.values():
        block = model.get_submodule(layout.block)
        for router in block.children() if layout.groups > 1 else ():
            row = ROWS.get(type(router).__name__)
            if row is not None:
                row.spec_of(router, block)


def _check_shapes(before: Blueprint, after: Blueprint, layouts: Mapping[str, MoELayout]) -> None:
    """Refuse a family in which something changes with the number of experts that is not a layer's experts or router."""
    known = {name for layout in layouts.values() for name in layout.names}
    for name, info in before.tensors.items():
        there = after.tensors.get(name)
        if name not in known and (there is None or there.shape != info.shape):
            raise ConfigError(
                f"{name} changes with the number of experts, from {info.shape} to {there.shape if there else None}, "
                f"and what of it belongs to which is not known: {type(before.model).__name__} cannot be made smaller."
            )
