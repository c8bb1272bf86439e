"""From a dense model to a sparse one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from transformers import PreTrainedConfig, PreTrainedModel

from moesaic import recipes
from moesaic.balance import LossTerm
from moesaic.core.errors import ConfigError
from moesaic.hf.auto import join_auto_classes
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
    num_experts: int | None = None,
    top_k: int | None = None,
    aux_coefficients: Mapping[str, float] | None = None,
    **options: Any,
) -> Model:
    """Replace feed-forward networks of a transformers model by MoE layers with fresh weights, in place.

    The model keeps its class's behaviour: ``generate``, Trainer, ``save_pretrained`` and the Auto classes work as
    before. Its ``output.loss`` gains the recipe's balance losses in training. Dropout inside a feed-forward network
    goes with it; dropout around it stays.

    Args:
        model: a model whose feed-forward networks are modules of their own.
        recipe: one of :func:`moesaic.recipes.names`, or what :func:`moesaic.recipes.get` returned for it.
        layers: "all"; "every-2", the second of each pair of blocks as in GShard and Switch; or indices. They count the
            blocks that have a feed-forward network, in depth order, the decoder's on from the encoder's.
        hidden: F of one expert; None for that of the network it replaces.
        num_experts: None for the recipe's number.
        top_k: None for the recipe's number.
        aux_coefficients: replace the recipe's coefficients, by name of the balance loss.
        **options: the recipe's options. ``init_std`` is the model's ``initializer_range`` unless given; ``kernel`` is
            not saved with the model.
    Returns:
        The same model.
    Raises:
        ConfigError: if the model, the recipe, the layers or an option is not usable; the model is untouched then.
    """
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
    if "init_std" not in options:
        options["init_std"] = _initializer_range(model.config)
    name = _name_of(recipe)
    published = {term.name: term.coefficient for term in recipes.get(name).balance if isinstance(term, LossTerm)}
    given = {"num_experts": num_experts, "top_k": top_k}
    options |= {name: value for name, value in given.items() if value is not None}
    kernel = {"kernel": options.pop("kernel")} if "kernel" in options else {}

    chosen = choose(find_feed_forwards(cast(PreTrainedModel, model.base_model)), layers)
    spec = SparseSpec(
        recipe=name,
        layers={one.path: _layer_spec(one, name, hidden, options) for one in chosen},
        aux_coefficients=published | dict(aux_coefficients or {}),
    )
    config = sparse_config(model.config, spec.to_dict())
    dense_config, dense_class = model.config, type(model)
    install(model, spec, **kernel)
    for part in model.modules():
        if part.__dict__.get("config") is dense_config:
            part.config = config  # type: ignore[assignment]
    # Saving would otherwise undo the renaming that loading the dense folder may have done.
    model.__dict__.pop("_weight_conversions", None)
    assert type(model) is sparse_class(dense_class)
    join_auto_classes(type(config))
    return model


def _name_of(recipe: str | Recipe) -> str:
    """A saved model names its recipe, so only one that can be found again by its name will do."""
    name = recipe if isinstance(recipe, str) else recipe.name
    if isinstance(recipe, Recipe) and (name not in recipes.names() or recipes.get(name) != recipe):
        raise ConfigError(
            f"sparsify needs a recipe that moesaic.recipes.get finds by its name, got one of your own named {name!r}. "
            "Pass a published one with options, or put your layer into the model yourself."
        )
    return name


def _layer_spec(one: FeedForward, recipe: str, hidden: int | None, options: dict[str, Any]) -> LayerSpec:
    published = {name: value for name, value in recipes.get(recipe).options.items() if name != "kernel"}
    return LayerSpec(width=one.width, hidden=one.hidden if hidden is None else hidden, options=published | options)


def _initializer_range(config: PreTrainedConfig) -> float | None:
    text = config.get_text_config()
    std = getattr(config, "initializer_range", getattr(text, "initializer_range", None))
    return None if std is None else float(std)
