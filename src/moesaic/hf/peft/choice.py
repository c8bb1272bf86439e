"""What a user asks to train: which experts of which layers, which of their projections, and what beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesaic.core.errors import ConfigError
from moesaic.hf.peft.blocks import PROJECTIONS, ExpertBlock

CHOICE = "_moesaic_choice"
"""The attribute of a model or its adapters in which what was asked for is kept, for :func:`moesaic.hf.check_trains`."""

Layers = str | Sequence[int]
Experts = str | Sequence[int] | Mapping[int, Sequence[int]]
Projections = str | Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What trains.

    Attributes:
        experts: by index of the MoE layer.
        projections: of those experts; a layer whose experts lack one trains the rest.
        rank: of each (layer, expert) that has fewer than the rest.
        router: whether the routers of these layers train.
        shared: whether their shared experts do.
        attention: whether the attention beside them does.
    """

    experts: Mapping[int, tuple[int, ...]]
    projections: tuple[str, ...]
    rank: Mapping[tuple[int, int], int]
    router: bool = False
    shared: bool = False
    attention: bool = False


def choose(
    blocks: Sequence[ExpertBlock],
    *,
    layers: Layers = "all",
    experts: Experts = "all",
    projections: Projections = "all",
    rank: int | Mapping[int, Mapping[int, int]] = 1,
    router: bool = False,
    shared: bool = False,
    attention: bool = False,
) -> Choice:
    """Check what a user asks for against the experts that a model has.

    Raises:
        ConfigError: if a layer, an expert or a projection is not there, or is asked for twice in two ways.
    """
    ranks: dict[tuple[int, int], int] = {}
    if isinstance(rank, Mapping):
        if experts != "all" or layers != "all":
            raise ConfigError(
                "rank by expert names the layers and experts that train, so layers and experts must be left 'all', "
                f"got layers={layers!r} and experts={experts!r}. Give rank={{layer: {{expert: rank}}}} alone."
            )
        experts = {layer: tuple(of_each) for layer, of_each in rank.items()}
        ranks = {(layer, expert): one for layer, of_each in rank.items() for expert, one in of_each.items()}
    chosen = _experts(blocks, _layers(blocks, layers, experts), experts)
    choice = Choice(
        experts=chosen,
        projections=_projections([blocks[layer] for layer in chosen], projections),
        rank=ranks,
        router=router,
        shared=shared,
        attention=attention,
    )
    _require_beside([blocks[layer] for layer in chosen], choice)
    return choice


def _layers(blocks: Sequence[ExpertBlock], layers: Layers, experts: Experts) -> list[int]:
    if isinstance(experts, Mapping):
        if layers != "all":
            raise ConfigError(
                f"experts by layer names the layers itself, so layers must be left 'all', got layers={layers!r} "
                f"and experts of the layers {sorted(experts)}. Give one of the two."
            )
        layers = list(experts)
    if layers == "all":
        return list(range(len(blocks)))
    indices = list(layers) if not isinstance(layers, str) else []
    good = all(isinstance(one, int) and 0 <= one < len(blocks) for one in indices)
    if not indices or not good or len(set(indices)) < len(indices):
        raise ConfigError(
            f"layers must be 'all' or different indices of MoE layers in 0..{len(blocks) - 1}, got {layers!r}. "
            f"They count in depth order; layer 0 is {blocks[0].path}."
        )
    return sorted(indices)


def _experts(blocks: Sequence[ExpertBlock], layers: list[int], experts: Experts) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    for layer in layers:
        wanted = experts[layer] if isinstance(experts, Mapping) else experts
        num_experts = blocks[layer].num_experts
        if wanted == "all":
            found[layer] = tuple(range(num_experts))
            continue
        # numpy's whole numbers too, as a trace counts
        indices = [int(one) for one in wanted if not isinstance(one, str)]
        good = all(0 <= one < num_experts for one in indices) and len(set(indices)) == len(wanted)
        if not indices or not good:
            raise ConfigError(
                f"experts must be 'all' or different indices in 0..{num_experts - 1} for layer {layer}, "
                f"{blocks[layer].path}, got {wanted!r}. Leave a layer out to train none of its experts."
            )
        found[layer] = tuple(sorted(indices))
    return found


def _projections(blocks: Sequence[ExpertBlock], projections: Projections) -> tuple[str, ...]:
    held = {one for block in blocks for one in block.projections}
    if projections == "all":
        return tuple(one for one in PROJECTIONS if one in held)
    named = list(projections) if not isinstance(projections, str) else []
    if not named or len(set(named)) < len(named) or not set(named) <= held:
        raise ConfigError(
            f"projections must be 'all' or some of {', '.join(one for one in PROJECTIONS if one in held)}, which these "
            f"experts have, got {projections!r}. Name each once."
        )
    return tuple(one for one in PROJECTIONS if one in named)


def _require_beside(blocks: Sequence[ExpertBlock], choice: Choice) -> None:
    for asked, name, found in (
        (choice.router, "router", [block.routers for block in blocks]),
        (choice.shared, "shared", [block.shared for block in blocks]),
        (choice.attention, "attention", [block.attention for block in blocks]),
    ):
        if asked and not any(found):
            raise ConfigError(
                f"{name}=True needs such a part beside the experts, and none of the {len(blocks)} layers from "
                f"{blocks[0].path} on has one that can be adapted. Leave {name} out."
            )
