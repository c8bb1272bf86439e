"""From a dense model to a sparse one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic import recipes
from moesaic.balance import check
from moesaic.core.errors import ConfigError
from moesaic.hf.auto import join_auto_classes
from moesaic.hf.causality import warn_of_later_tokens
from moesaic.hf.config import sparse_config
from moesaic.hf.find import FeedForward, choose, find_feed_forwards
from moesaic.hf.layers import is_sparse, moe_layers
from moesaic.hf.modeling import install, sparse_class
from moesaic.hf.spec import LayerSpec, SparseSpec
from moesaic.recipes import Recipe

Model = TypeVar("Model", bound=PreTrainedModel)


def sparsify(
    model: Model,
    recipe: str | Recipe,
    *,
    layers: str | list[int] = "all",
    hidden: int | None = None,
    num_experts: int | Sequence[int] | None = None,
    top_k: int | None = None,
    aux_coefficients: Mapping[str, float] | None = None,
    balance: Mapping[str, float] | None = None,
    **options: Any,
) -> Model:
    """Replace feed-forward networks of a transformers model by MoE layers with fresh weights, in place.

    Recipes of low-rank experts keep the networks, frozen, and add fresh experts to them.

    The model keeps its class's behaviour: ``generate``, Trainer, ``save_pretrained`` and the Auto classes work as
    before. Its ``output.loss`` gains the recipe's balance losses in training. Dropout inside a feed-forward network
    goes with it; dropout around it stays.

    Args:
        model: a model whose feed-forward networks are modules of their own.
        recipe: one of :func:`moesaic.recipes.names`, or what :func:`moesaic.recipes.get` returned for it.
        layers: "all"; "every-2", the second of each pair of blocks as in GShard and Switch; or indices. They count the
            blocks that have a feed-forward network, in depth order, the decoder's on from the encoder's.
        hidden: F of one expert; None for that of the network it replaces.
        num_experts: None for the recipe's number; a list has one for each MoE layer.
        top_k: None for the recipe's number.
        aux_coefficients: replace the recipe's coefficients, by name of the balance loss.
        balance: replaces the recipe's balance: names of :data:`moesaic.balance.TERMS`, each with its number, a loss's
            coefficient or a controller's rate, as in ``{"switch": 0.01, "z": 1e-3}``; ``{}`` for none.
        **options: the recipe's options. ``init_std`` is the model's ``initializer_range`` (routers that are published
            to start otherwise have ``gate_init_std``) and ``vocab_size`` its own unless given; ``kernel`` is not saved
            with the model.
    Returns:
        The same model.
    Raises:
        ConfigError: if the model, the recipe, the layers or an option is not usable, or a term of ``balance`` does
            nothing with this recipe's router; the model is untouched then.
    Warns:
        UserWarning: if tokens would see later ones in a causal language model.
    """
    kernel = {"kernel": options.pop("kernel")} if "kernel" in options else {}
    spec = sparse_spec(
        model,
        recipe,
        layers=layers,
        hidden=hidden,
        num_experts=num_experts,
        top_k=top_k,
        aux_coefficients=aux_coefficients,
        balance=balance,
        **options,
    )
    warn_of_later_tokens(model, spec)
    config = sparse_config(model.config, spec.to_dict())
    dense_config, dense_class = model.config, type(model)
    install(model, spec, keep_base=True, **kernel)
    for part in model.modules():
        if part.__dict__.get("config") is dense_config:
            part.config = config  # type: ignore[assignment]
    # Saving would otherwise undo the renaming that loading the dense folder may have done.
    model.__dict__.pop("_weight_conversions", None)
    assert type(model) is sparse_class(dense_class)
    join_auto_classes(type(config))
    return model


def sparse_spec(
    model: PreTrainedModel,
    recipe: str | Recipe,
    *,
    layers: str | list[int] = "all",
    hidden: int | None = None,
    num_experts: int | Sequence[int] | None = None,
    top_k: int | None = None,
    aux_coefficients: Mapping[str, float] | None = None,
    balance: Mapping[str, float] | None = None,
    **options: Any,
) -> SparseSpec:
    """What :func:`sparsify` would put where, from the same arguments; the model stays as it is.

    Raises:
        ConfigError: see :func:`sparsify`.
    """
    _check_model(model)
    name = _name_of(recipe)
    if top_k is not None:
        options["top_k"] = top_k
    options = _from_config(model.config, recipes.get(name)) | options
    chosen = choose(find_feed_forwards(cast(PreTrainedModel, model.base_model)), layers)
    published = {} if balance is not None else {term.name: term.coefficient for term in recipes.get(name).losses}
    spec = SparseSpec(
        recipe=name,
        layers=_layer_specs(chosen, recipes.get(name), hidden, num_experts, options),
        aux_coefficients=published | dict(aux_coefficients or {}),
        balance=None if balance is None else dict(balance),
    )
    if balance is not None:
        _check_balance(spec)
    return spec


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"sparsify needs a transformers model, got {type(model).__name__}. For your own module, put the layer of "
            "moesaic.recipes.get(name).layer(...) where its feed-forward network is."
        )
    if is_sparse(model):
        first, *rest = moe_layers(model)
        raise ConfigError(
            f"sparsify needs a dense model, got one with {len(rest) + 1} MoE layers already, the first at {first}. "
            "Sparsify a model once, with all layers you want."
        )


def _name_of(recipe: str | Recipe) -> str:
    """A saved model names its recipe, so only one that can be found again by its name will do."""
    name = recipe if isinstance(recipe, str) else recipe.name
    if isinstance(recipe, Recipe) and (name not in recipes.names() or recipes.get(name) != recipe):
        raise ConfigError(
            f"sparsify needs a recipe that moesaic.recipes.get finds by its name, got one of your own named {name!r}. "
            "Pass a published one with options, or put your layer into the model yourself."
        )
    return name


def _layer_specs(
    chosen: list[FeedForward],
    recipe: Recipe,
    hidden: int | None,
    num_experts: int | Sequence[int] | None,
    options: dict[str, Any],
) -> dict[str, LayerSpec]:
    """What each layer is built with: published options, those given, and what differs by depth."""
    counts = [num_experts] * len(chosen) if num_experts is None or isinstance(num_experts, int) else list(num_experts)
    if len(counts) != len(chosen):
        raise ConfigError(
            f"num_experts must be one number or one for each of the {len(chosen)} MoE layers, got {len(counts)} "
            "numbers. Give as many as there are layers, in depth order."
        )
    published = {name: value for name, value in recipe.options.items() if name != "kernel"}
    specs = {}
    for index, (one, count) in enumerate(zip(chosen, counts, strict=True)):
        mine = published | options
        if isinstance(num_experts, int):
            mine["num_experts"] = num_experts
        if recipe.by_depth is not None:
            mine = recipe.by_depth(mine, index, len(chosen))
        if not isinstance(num_experts, int) and count is not None:
            mine["num_experts"] = count
        specs[one.path] = LayerSpec(width=one.width, hidden=one.hidden if hidden is None else hidden, options=mine)
    return specs


def _check_balance(spec: SparseSpec) -> None:
    """Try each balance term on a small layer with the options of each that the model will have."""
    recipe, width = recipes.get(spec.recipe), 8
    kinds = {repr(sorted(layer.options.items())): layer.options for layer in spec.layers.values()}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for options in kinds.values():
            check(spec.terms, cast(nn.Module, recipe.layer(width, hidden=width, **options)), width)


def _from_config(config: PreTrainedConfig, recipe: Recipe) -> dict[str, Any]:
    """What the model knows that the recipe would otherwise not."""
    text = config.get_text_config()
    std = getattr(config, "initializer_range", getattr(text, "initializer_range", None))
    known = {"init_std": None if std is None else float(std)}
    vocab_size = getattr(text, "vocab_size", None)
    if "vocab_size" in recipe.options and vocab_size is not None:
        known["vocab_size"] = int(vocab_size)
    return known
