"""Upcycling: a dense model's networks, copied into experts, start a mixture where the dense model stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.convert.checkpoint.source import Source, open_source
from moesaic.convert.grow.likeness import ALIKE, Likeness, likeness, neat
from moesaic.convert.grow.target import rounding_of, target
from moesaic.convert.layout.room import SMALL_HIDDEN, Filled, Room
from moesaic.convert.progress import tracked
from moesaic.convert.proof.probe import Batch
from moesaic.convert.run import Converted, convert
from moesaic.convert.steps import Change
from moesaic.convert.weights.parts import ScaleIn, copies, emptied, noised, partly_drawn, scaled, silenced, times
from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.errors import ConfigError

_SAME = 1e-9


def upcycle(
    source: str | Path | PreTrainedModel,
    recipe: str = "mixtral",
    *,
    num_experts: int | Sequence[int] | None = None,
    top_k: int | None = None,
    layers: str | list[int] = "all",
    granularity: int = 1,
    method: Literal["copy", "drop"] = "copy",
    drop_ratio: float = 0.5,
    noise: float = 0.0,
    shared: Literal["silent", "dense"] = "silent",
    scale_in: ScaleIn = "down",
    router_std: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    probe: str | Tensor | Batch | None = "random",
    tolerance: float = 1e-5,
    shard_bytes: int | None = None,
    **options: Any,
) -> Converted:
    """Turn a dense model into a mixture whose experts are copies of its feed-forward networks.

    The mixture computes what the dense model does, until training lets experts part, where the weights of a token's
    experts add up to a number that is the same for every token: then the experts are divided by it. Where they do not
    (recipes that weigh by raw scores: switch, olmoe, deepseek-moe, ...), experts are divided by the mean over random
    tokens and the receipt tells the gap. Which is the case is not looked up but tried on a small layer.

    Args:
        source: a folder, or a model in memory, which stays as it is.
        recipe: one of :func:`moesaic.recipes.names` with experts of the kind that the model has.
        num_experts: E; None for the recipe's number.
        top_k: K; None for the recipe's number.
        layers: see :func:`moesaic.sparsify`.
        granularity: G, shards that each network is cut into, so that experts are 1 / G as wide and G experts make up
            the network: a virtual group, whose experts start with one and the same router row, so that they are chosen
            together. K is a multiple of G.
        method: "copy", or "drop" for drop-upcycling: part of each expert's neurons is drawn anew.
        drop_ratio: which part, for "drop".
        noise: standard deviation of noise on the experts, as a part of that of each matrix.
        shared: what the expert that every token visits is, where the recipe has one. "silent": it gives nothing yet and
            the routed experts are the dense network. "dense": the other way round.
        scale_in: which matrices take the factor; see :func:`~moesaic.convert.weights.parts.scaled`.
        router_std: draws the router's weight from a normal of this width; None for as the recipe does.
        seed: draws routers, noise and neurons.
        out: folder to write; None for a model in memory.
        probe: see :func:`~moesaic.convert.run.convert`.
        tolerance: largest difference of logits where the function is kept, relative to the largest logit if that is
            above 1, before the conversion is refused; ten times that where float32 weights are rounded, being
            multiplied by a number that is no power of two.
        shard_bytes: see :func:`~moesaic.convert.run.convert`.
        **options: the recipe's options, and ``aux_coefficients`` and ``balance`` of :func:`moesaic.sparsify`.
    Returns:
        The model or folder, and the receipt.
    Raises:
        ConfigError: if the model or an option is not usable.
        CheckpointError: if the function was to be kept and is not, or the source is damaged.

    Source: Komatsuzaki et al. 2022, "Sparse Upcycling"; He et al. 2024, arXiv:2410.07524 (granularity); Nakamura et al.
    2025, "Drop-Upcycling".
    """
    if method not in ("copy", "drop"):
        raise ConfigError(f"method must be 'copy' or 'drop', got {method!r}. 'copy' keeps the function.")
    opened = open_source(source)
    how = Upcycling(
        granularity=granularity,
        drop_ratio=drop_ratio if method == "drop" else 0.0,
        noise=noise,
        shared=shared,
        scale_in=scale_in,
        router_std=router_std,
    )
    numbers = {"num_experts": num_experts, "top_k": top_k, "layers": layers, "seed": seed, **options}
    change = upcycling(opened, recipe, how, tolerance=tolerance, **numbers)
    return convert(opened, change, out, probe=probe, shard_bytes=shard_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycling:
    """How experts come from the dense network; see :func:`upcycle` for what each means."""

    granularity: int = 1
    drop_ratio: float = 0.0
    noise: float = 0.0
    shared: Literal["silent", "dense"] = "silent"
    scale_in: ScaleIn = "down"
    router_std: float | None = None

    def __post_init__(self) -> None:
        if self.shared not in ("silent", "dense"):
            raise ConfigError(f"shared must be 'silent' or 'dense', got {self.shared!r}. Both keep the function.")
        if self.granularity < 1:
            raise ConfigError(f"granularity must be at least 1, got {self.granularity}. 1 copies networks whole.")
        if self.router_std is not None and not 0 <= self.router_std < math.inf:
            raise ConfigError(f"router_std must be at least 0, got {self.router_std}. Leave it out if unsure.")


def upcycling(source: Source, recipe: str, how: Upcycling, *, tolerance: float = 1e-5, **numbers: Any) -> Change:
    """The change that :func:`upcycle` makes; no weight is read.

    Args:
        source: dense.
        recipe: of the layers.
        how: they are filled.
        tolerance: see :func:`upcycle`.
        **numbers: of :func:`~moesaic.convert.grow.target.target`.
    Raises:
        ConfigError: see :func:`upcycle`.
    """
    made = target(source, recipe, hidden=lambda network: _shard(network.hidden, how.granularity), **numbers)
    layers_made = [_Layer.of(room, how) for room in tracked(made.rooms, "planning", len(made.rooms))]
    is_kept = all(layer.keeps for layer in layers_made) and how.drop_ratio == 0 and how.noise == 0
    rounding = max(rounding_of(layer.scale, source, layer.room.network) for layer in layers_made)
    return Change(
        method="upcycle",
        config=made.config,
        steps=tuple(layer.room.step(layer.fill, layer.move, layer.router) for layer in layers_made),
        notes=_notes(recipe, how, layers_made),
        promises=tolerance * rounding if is_kept and rounding < math.inf else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Layer:
    """One layer's upcycling, with the factor that makes up for the weights of a token."""

    room: Room
    how: Upcycling
    router: Mapping[str, Tensor]
    scale: float
    keeps: bool

    @classmethod
    def of(cls, room: Room, how: Upcycling) -> _Layer:
        """Find the factor by trying."""
        _check_shared(room, how)
        router = _router(room, how)
        bare = replace(how, drop_ratio=0.0, noise=0.0)
        plain = cls(room=room, how=bare, router=router, scale=1.0, keeps=False)
        alike = plain.likeness()
        if how.granularity > 1 and not alike.is_parallel:
            raise ConfigError(
                f"The router of recipe {room.spec.recipe} cannot be made to choose virtual groups of "
                f"{how.granularity} experts whole. Use granularity=1, or a recipe as mixtral."
            )
        # Where tokens are mixed, as in Soft MoE, there is no one factor to make up for.
        scale = neat(1 / alike.multiple) if alike.cosine > ALIKE else 1.0
        filled = replace(plain, scale=scale).likeness()
        keeps = filled.is_even and abs(filled.multiple - 1) < _SAME
        return cls(room=room, how=how, router=router, scale=scale, keeps=keeps)

    @property
    def drawn(self) -> Tensor:
        """The router's weight as the recipe draws it; ones where it has none."""
        return self.room.fresh(torch.float32).get("router.weight", torch.ones(1))

    def likeness(self) -> Likeness:
        """What a small layer gives that is filled like this."""
        return likeness(self.room, self.fill, SMALL_HIDDEN * self.how.granularity, self.router)

    def fill(self, ffn: DenseFFN) -> Filled:
        """The layer's networks."""
        how, draw = self.how, torch.Generator().manual_seed(self.room.seed)
        stack = copies(ffn, self.room.num_experts, how.granularity)
        if how.drop_ratio > 0:
            stack, _ = partly_drawn(stack, how.drop_ratio, draw)
        stack = noised(stack, how.noise, draw)
        if how.shared == "dense" and self.room.shared_hidden:
            return Filled(experts=silenced(stack), shared=replace(ffn, down_FD=times(ffn.down_FD, self.scale)))
        is_squared = self.room.network.activation == "relu_squared"
        return Filled(experts=scaled(stack, self.scale, how.scale_in, is_squared=is_squared))

    def move(self, ffn: DenseFFN) -> Filled:
        """The same for moments: they go where their weights go, and what is drawn anew has none."""
        stack = copies(ffn, self.room.num_experts, self.how.granularity)
        if self.how.drop_ratio > 0:
            draw = torch.Generator().manual_seed(self.room.seed)
            stack = emptied(stack, partly_drawn(stack, self.how.drop_ratio, draw)[1])
        if self.how.shared == "dense" and self.room.shared_hidden:
            return Filled(experts=silenced(stack), shared=ffn)
        return Filled(experts=stack)


def virtual_groups(router: Mapping[str, Tensor], num_experts: int, granularity: int) -> dict[str, Tensor]:
    """Router tensors in which the experts of a virtual group have one and the same row.

    Equal rows give equal logits, and equal logits are chosen from the lowest expert on: a group is chosen whole where K
    is a multiple of G.

    Args:
        router: tensors by name; those whose first dimension is E are changed.
        num_experts: E.
        granularity: G.

    Source: He et al. 2024, section 3.2.
    """
    group_E = torch.arange(num_experts) // granularity
    return {name: tensor[group_E] for name, tensor in router.items() if tensor.shape[:1] == (num_experts,)}


def _router(room: Room, how: Upcycling) -> dict[str, Tensor]:
    """What the method sets in place of what the recipe draws."""
    fresh = {name: tensor for name, tensor in room.fresh(torch.float32).items() if name.startswith("router.")}
    made: dict[str, Tensor] = {}
    if how.router_std is not None:
        if "router.weight" not in fresh:
            raise ConfigError(f"Recipe {room.spec.recipe} has no router weight to draw. Leave out router_std.")
        draw = torch.Generator().manual_seed(room.seed)
        made["router.weight"] = torch.randn(fresh["router.weight"].shape, generator=draw) * how.router_std
    if how.granularity > 1:
        made |= virtual_groups(fresh | made, room.num_experts, how.granularity)
    if how.shared == "dense" and "shared.token_gate_D" in room.shapes:
        made["shared.token_gate_D"] = torch.zeros(room.shapes["shared.token_gate_D"])
    return made


def _check_shared(room: Room, how: Upcycling) -> None:
    if how.shared != "dense":
        return
    wanted, name = room.network.hidden, room.spec.recipe
    if room.shared_hidden != wanted:
        has = f"of width {room.shared_hidden}" if room.shared_hidden else "none"
        raise ConfigError(
            f"shared='dense' needs a shared expert as wide as the dense network, {wanted}, and recipe {name} has "
            f"{has}. Set num_shared and granularity to the same number, or leave shared out."
        )


def _shard(hidden: int, granularity: int) -> int:
    if hidden % granularity:
        raise ConfigError(
            f"granularity must divide the hidden width {hidden} of the dense network, got {granularity}. "
            "Use a divisor, such as 2 or 4."
        )
    return hidden // granularity


def _notes(recipe: str, how: Upcycling, made: list[_Layer]) -> tuple[str, ...]:
    experts = sorted({layer.room.num_experts for layer in made})
    what = "copies of the dense network"
    if how.granularity > 1:
        what = f"copies of {how.granularity} shards of the dense network, in virtual groups"
    notes = [f"recipe {recipe}: {' or '.join(map(str, experts))} experts in {len(made)} layers, {what}"]
    if how.drop_ratio > 0:
        notes.append(f"{how.drop_ratio:.0%} of each expert's neurons drawn anew")
    if how.noise > 0:
        notes.append(f"noise of {how.noise:g} times the weights' spread on every expert")
    if how.shared == "dense":
        notes.append("the shared expert is the dense network, routed experts give nothing yet")
    scales = sorted({round(layer.scale, 6) for layer in made})
    if scales != [1.0]:
        told = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        notes.append(f"outputs times {told}, since the weights of a token add up to 1 over it")
    if all(not layer.router.get("router.weight", layer.drawn).any() for layer in made):
        notes.append("routers start at 0: until they have learnt, tokens go to the first experts")
    if not all(layer.keeps for layer in made):
        notes.append(f"recipe {recipe} with these options does not keep the dense model's function exactly")
    return tuple(notes)
