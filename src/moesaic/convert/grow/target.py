"""The sparse model that a dense one becomes: its configuration, and a room for each network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from moesaic import recipes
from moesaic.convert.checkpoint.source import Source
from moesaic.convert.layout.dense import Network, networks
from moesaic.convert.layout.room import Room
from moesaic.core.errors import ConfigError
from moesaic.hf.causality import warn_of_later_tokens
from moesaic.hf.config import sparse_config
from moesaic.hf.convert import sparse_spec

_NO_LIMIT = 6e4
"""A bound on activations that nothing reaches, and that float16 still has."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Target:
    """What is to be filled.

    Attributes:
        config: of the sparse model.
        rooms: one for each network that becomes a layer, in depth order.
    """

    config: PreTrainedConfig
    rooms: tuple[Room, ...]


def target(
    source: Source,
    recipe: str,
    *,
    hidden: Callable[[Network], int],
    layers: str | list[int] = "all",
    num_experts: int | Sequence[int] | None = None,
    top_k: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Target:
    """Plan the sparse model; nothing is read.

    Args:
        source: dense.
        recipe: one of :func:`moesaic.recipes.names`.
        hidden: F of one expert, from the dense network.
        layers: see :func:`moesaic.sparsify`.
        num_experts: see :func:`moesaic.sparsify`.
        top_k: None for the recipe's number.
        seed: draws what is fresh; each layer has a seed of its own.
        **options: as of :func:`moesaic.sparsify`; the activation is the dense network's.
    Raises:
        ConfigError: if the model is not dense, a network is none that experts can be, or an option is not usable.
    """
    if "kernel" in options:
        raise ConfigError("kernel is not saved with a model, so a conversion has none to set. Leave it out.")
    model = source.blueprint.model
    chosen = networks(model, layers)
    options = _with_activation(recipe, chosen, options)
    if top_k is not None:
        options["top_k"] = top_k
    spec = sparse_spec(model, recipe, layers=layers, num_experts=num_experts, **options)
    sizes = {one.path: replace(spec.layers[one.path], hidden=hidden(one)) for one in chosen}
    spec = replace(spec, layers=sizes)
    warn_of_later_tokens(model, spec)
    rooms = tuple(Room(spec=spec, network=one, seed=seed + index) for index, one in enumerate(chosen))
    return Target(config=sparse_config(source.config, spec.to_dict()), rooms=rooms)


def rounding_of(factor: float, source: Source, network: Network) -> float:
    """By how much a tolerance grows where weights are rounded again when they are multiplied.

    A power of two rounds nothing; biases are rounded, since 1 is taken off them. Where something is, float32 weights
    are off by 3e-8 of themselves, which costs what computing in float32 costs; types of fewer bits cost too much to
    promise anything.
    """
    dtype = source.names[network.names[0]].dtype
    is_exact = math.frexp(factor)[0] == 0.5 and not network.biases
    if is_exact or dtype == torch.float64:
        return 1.0
    return 10.0 if dtype == torch.float32 else math.inf


def _with_activation(recipe: str, chosen: list[Network], options: dict[str, Any]) -> dict[str, Any]:
    """Let experts be what the dense networks are."""
    found = sorted({one.activation for one in chosen})
    if len(found) > 1:
        raise ConfigError(
            f"All networks that become experts must have one activation, got {' and '.join(found)}. Name the layers "
            "of one of them."
        )
    known = recipes.get(recipe).options
    if "activation" in known:
        fitting: dict[str, Any] = {"activation": found[0]}
    elif {"alpha", "limit"} <= known.keys() and found == ["silu"]:
        # (g sigmoid(g)) (u + 1), unbounded and with 1 taken off a bias, is silu(g) u.
        fitting = {"alpha": 1.0, "limit": _NO_LIMIT}
    else:
        raise ConfigError(
            f"The experts of recipe {recipe} have no option for the dense network's activation {found[0]}. "
            "Use a recipe as mixtral."
        )
    for name, value in fitting.items():
        if options.get(name, value) != value:
            raise ConfigError(
                f"The dense model's networks need {name}={value} of recipe {recipe}, got {options[name]}. Leave it out."
            )
    return options | fitting
