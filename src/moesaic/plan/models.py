"""Which model is planned for: one of the zoo, a configuration on disk, or one of these with other numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moesaic import zoo
from moesaic.core.errors import ConfigError
from moesaic.zoo import Experts, Layer, ModelShape


def find(text: str) -> ModelShape:
    """The shape of a model.

    Args:
        text: a name of the zoo, or a ``config.json`` of transformers or the folder that has one.
    Raises:
        ConfigError: if it is neither.
    """
    if text in zoo.names() or not Path(text).exists():
        return zoo.get(text)
    from moesaic.hf.shape import shape_of_config

    return shape_of_config(text)


def changed(shape: ModelShape, *, num_experts: int | None = None, top_k: int | None = None) -> ModelShape:
    """The same model with another number of experts, or of choices, in each layer that has any.

    Raises:
        ConfigError: if it has none, or if groups of experts do not divide the new number.
    """
    if num_experts is None and top_k is None:
        return shape
    if not shape.mixtures:
        raise ConfigError(f"A model with experts was needed to change them, got {shape.name} without any.")

    def one(layer: Layer) -> Layer:
        feeds = tuple(_changed(feed, num_experts, top_k) if isinstance(feed, Experts) else feed for feed in layer.feeds)
        return replace(layer, feeds=feeds)

    words = [f"{num_experts} experts"] * (num_experts is not None) + [f"top {top_k}"] * (top_k is not None)
    return replace(
        shape,
        name=f"{shape.name} with {', '.join(words)}",
        layers=tuple(map(one, shape.layers)),
        encoder=tuple(map(one, shape.encoder)),
        published=None,
    )


def _changed(experts: Experts, num_experts: int | None, top_k: int | None) -> Experts:
    count = experts.num_experts if num_experts is None else num_experts
    if count % experts.groups:
        raise ConfigError(
            f"experts must be a multiple of the model's {experts.groups} groups, got {count}. "
            f"{count // experts.groups * experts.groups or experts.groups} would fit."
        )
    return replace(experts, num_experts=count, top_k=experts.top_k if top_k is None else top_k)
