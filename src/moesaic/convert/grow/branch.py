"""Branch-train-mix: dense models that were trained apart become the experts of one mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.convert.checkpoint.source import Source, joined, open_source
from moesaic.convert.grow.likeness import unit
from moesaic.convert.grow.target import target
from moesaic.convert.grow.tokens import Text, batches, dense_model, run_networks
from moesaic.convert.layout.room import Filled, Room, network_tensors
from moesaic.convert.proof.probe import Batch
from moesaic.convert.run import Converted, convert
from moesaic.convert.steps import Change, Maker, Step
from moesaic.convert.weights import gates
from moesaic.convert.weights.parts import scaled
from moesaic.convert.weights.stack import ExpertStack
from moesaic.core.errors import CheckpointError, ConfigError


def branch_train_mix(
    base: str | Path | PreTrainedModel,
    branches: Sequence[str | Path | PreTrainedModel],
    *,
    recipe: str = "mixtral",
    top_k: int | None = None,
    layers: str | list[int] = "all",
    rest: Literal["average", "base"] = "average",
    weights: Sequence[float] | None = None,
    gate: Literal["hidden", "random"] | None = None,
    prompts: Sequence[Text] | None = None,
    negative_prompts: Sequence[Text | None] | None = None,
    gate_scale: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    probe: str | Tensor | Batch | None = "random",
    shard_bytes: int | None = None,
    **options: Any,
) -> Converted:
    """Mix dense models of one shape: the networks of each become an expert, and everything else is averaged.

    Args:
        base: the model that the branches came from, or any of their shape: its configuration and tokenizer are the
            mixture's, it reads the prompts, and the receipt tells how far the mixture's logits are from its own. List
            it among the branches too if it shall be an expert.
        branches: one for each expert.
        recipe: one of :func:`moesaic.recipes.names` with experts of the kind that the models have.
        top_k: K; None for the recipe's number.
        layers: which networks become experts; see :func:`moesaic.sparsify`. The others are averaged too.
        rest: "average", the branches' mean, as Branch-Train-MiX; "base", the base's own, as mergekit.
        weights: what part of the mean each branch has; None for equal parts.
        gate: "hidden", each expert's row points to the mean of what its prompts give at the layer; "random", as the
            recipe draws it. None for "hidden" where there are prompts.
        prompts: for each branch, texts or token ids that it is for.
        negative_prompts: for each branch, those that it is not for; None for none.
        gate_scale: length of the rows of a gate made of prompts.
        tokenizer: for texts; None for that of the base's folder.
        seed: draws what the recipe draws.
        out: folder to write; None for a model in memory.
        probe: see :func:`~moesaic.convert.run.convert`.
        shard_bytes: see :func:`~moesaic.convert.run.convert`.
        **options: the recipe's options, and ``aux_coefficients`` and ``balance`` of :func:`moesaic.sparsify`.
    Returns:
        The model or folder, and the receipt.
    Raises:
        ConfigError: if the models are not of one shape, or an option is not usable.
        CheckpointError: if a folder is damaged.

    Source: Sukhbaatar et al. 2024, "Branch-Train-MiX", section 3.2; mergekit-moe for the gate.
    """
    sources = [open_source(one) for one in (base, *branches)]
    how = Mixing(
        rest=rest,
        weights=_parts(weights, len(branches)),
        gate=gate or ("random" if prompts is None else "hidden"),
        prompts=prompts,
        negative_prompts=negative_prompts,
        gate_scale=gate_scale,
        tokenizer=tokenizer,
    )
    change = mixing(sources, recipe, how, top_k=top_k, layers=layers, seed=seed, **options)
    return convert(joined(sources), change, out, probe=probe, shard_bytes=shard_bytes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mixing:
    """How models are mixed; see :func:`branch_train_mix` for what each means."""

    weights: tuple[float, ...]
    rest: Literal["average", "base"] = "average"
    gate: Literal["hidden", "random"] = "random"
    prompts: Sequence[Text] | None = None
    negative_prompts: Sequence[Text | None] | None = None
    gate_scale: float = 1.0
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        if self.rest not in ("average", "base"):
            raise ConfigError(f"rest must be 'average' or 'base', got {self.rest!r}. Branch-Train-MiX averages.")
        if self.gate not in ("hidden", "random"):
            raise ConfigError(f"gate must be 'hidden' or 'random', got {self.gate!r}. 'hidden' needs prompts.")
        if self.gate == "hidden" and self.prompts is None:
            raise ConfigError(
                "gate='hidden' points to what prompts give, got none. Pass prompts, a list for each branch."
            )
        for name in ("prompts", "negative_prompts"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.weights):
                raise ConfigError(
                    f"{name} must have one entry for each of the {len(self.weights)} branches, got {len(given)}. "
                    "Give each expert its own."
                )
        if not self.gate_scale > 0:
            raise ConfigError(f"gate_scale must be above 0, got {self.gate_scale}. mergekit has 1.")


def mixing(
    sources: Sequence[Source],
    recipe: str,
    how: Mixing,
    **numbers: Any,
) -> Change:
    """The change that :func:`branch_train_mix` makes of the joined sources; the base is the first.

    Args:
        sources: the base and the branches.
        recipe: of the layers.
        how: they are mixed.
        **numbers: of :func:`~moesaic.convert.grow.target.target`, but for that of the experts.
    Raises:
        ConfigError: see :func:`branch_train_mix`.
    """
    base, branches = sources[0], sources[1:]
    for branch in branches:
        _check_alike(base, branch)
    made = target(base, recipe, hidden=lambda network: network.hidden, num_experts=len(branches), **numbers)
    routers = _gates(base, made.rooms, how)
    steps = [_experts_step(room, router, len(branches)) for room, router in zip(made.rooms, routers, strict=True)]
    networks = {name for room in made.rooms for name in room.network.names}
    steps.append(_dropped(networks, "the branches' networks are the experts"))
    rest = [name for name in base.names if name not in networks]
    prefixes = [f"{number}:" for number in range(1, len(branches) + 1)]
    if how.rest == "average":
        steps += [_mean_step(name, prefixes, how.weights) for name in rest]
        steps.append(_dropped(rest, "the mean of the branches takes its place"))
    else:
        steps.append(_dropped([p + name for p in prefixes for name in rest], "the base's takes its place"))
    return Change(
        method="branch-train-mix",
        config=made.config,
        steps=tuple(step for step in steps if step.takes),
        notes=_notes(recipe, how, len(branches), routers),
    )


def _experts_step(room: Room, router: Mapping[str, Tensor], count: int) -> Step:
    network, shapes, prefix = room.network, room.shapes, f"{room.network.prefix}.moe"
    names = tuple(f"{number}:{name}" for number in range(1, count + 1) for name in network.names)
    factor = unit(room, router)

    def stacked(tensors: Mapping[str, Tensor], times: float) -> tuple[ExpertStack, dict[str, Tensor]]:
        ffns = [
            network.read({name: tensors[f"{number}:{name}"] for name in network.names})
            for number in range(1, count + 1)
        ]
        stack = scaled(ExpertStack.of(ffns), times)
        return stack, network_tensors(shapes, Filled(experts=stack), ffns[0])

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stack, made = stacked(tensors, factor)
        fresh = room.fresh(stack.up_EDF.dtype)
        fresh |= {name: tensor.to(fresh[name].dtype) for name, tensor in router.items()}
        return {f"{prefix}.{name}": (fresh | made)[name].contiguous() for name in shapes}

    def moments(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stack, made = stacked(tensors, 1.0)
        return {
            f"{prefix}.{name}": made[name].contiguous() if name in made else stack.up_EDF.new_zeros(shape)
            for name, shape in shapes.items()
        }

    return Step(takes=names, gives=tuple(f"{prefix}.{name}" for name in shapes), run=run, moments=moments)


def _mean_step(name: str, prefixes: Sequence[str], weights: Sequence[float]) -> Step:
    takes = tuple(prefix + name for prefix in prefixes)

    def mean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = tensors[takes[0]]
        if not first.is_floating_point():
            if any(not torch.equal(first, tensors[one]) for one in takes):
                raise CheckpointError(
                    f"{name} holds whole numbers that differ between the branches. Mix models of one kind."
                )
            return {name: first}
        wide = torch.promote_types(first.dtype, torch.float32)
        total = sum(tensors[one].to(wide) * weight for one, weight in zip(takes, weights, strict=True))
        assert isinstance(total, Tensor)
        return {name: total.to(first.dtype)}

    run: Maker = mean
    return Step(takes=takes, gives=(name,), run=run, moments=run)


def _dropped(names: Sequence[str] | set[str], why: str) -> Step:
    return Step(takes=tuple(sorted(names)), gives=(), run=lambda _: {}, moments=lambda _: {}, why=why)


def _gates(base: Source, rooms: Sequence[Room], how: Mixing) -> list[dict[str, Tensor]]:
    """The router tensors of each layer, empty where the recipe draws them."""
    if how.gate == "random" or how.prompts is None:
        return [{} for _ in rooms]
    model, found = dense_model(base), [room.network for room in rooms]

    def means(text: Text) -> dict[str, Tensor]:
        read = run_networks(model, found, batches(base, text, how.tokenizer))
        return {path: x_TD.mean(dim=0, keepdim=True) for path, x_TD in read.items()}

    negative = how.negative_prompts or [None] * len(how.prompts)
    wanted = [means(text) for text in how.prompts]
    unwanted = [None if text is None else means(text) for text in negative]
    made = []
    for room in rooms:
        path = room.network.path
        gate = gates.from_prompts(
            [one[path] for one in wanted], [None if one is None else one[path] for one in unwanted], how.gate_scale
        )
        if gates.has_hidden_layer(room.shapes):
            gate = gates.with_hidden_layer(gate, torch.cat([one[path] for one in wanted]))
        made.append(gate.tensors(room.shapes))
    return made


def _check_alike(base: Source, branch: Source) -> None:
    """Refuse to mix models whose tensors differ in name or shape, naming the first."""
    for name in sorted(base.names.keys() | branch.names.keys()):
        mine, theirs = base.names.get(name), branch.names.get(name)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            has, had = (one.shape if one is not None else "nothing" for one in (mine, theirs))
            raise ConfigError(
                f"Branches must have the base's tensors, but {name} is {has} in {base.where} and {had} in "
                f"{branch.where}. Mix models that were trained from one."
            )


def _parts(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """What part of the mean each branch has; they add up to 1."""
    if count == 0:
        raise ConfigError("Branch-train-mix needs at least two branches, got none. Pass the models to mix.")
    if weights is None:
        return (1 / count,) * count
    if len(weights) != count or any(not 0 <= one < math.inf for one in weights) or sum(weights) <= 0:
        raise ConfigError(
            f"weights must be {count} numbers of at least 0, not all 0, one for each branch, got {list(weights)}. "
            "Leave them out for equal parts."
        )
    return tuple(one / sum(weights) for one in weights)


def _notes(recipe: str, how: Mixing, count: int, routers: Sequence[Mapping[str, Tensor]]) -> tuple[str, ...]:
    rest = (
        "the base's"
        if how.rest == "base"
        else "the mean of the branches, in parts " + ", ".join(f"{weight:.3g}" for weight in how.weights)
    )
    notes = [f"recipe {recipe}: {count} branches are the experts of {len(routers)} layers; the rest is {rest}"]
    if how.gate == "hidden":
        closest = [_largest_cosine(router["router.weight"]) for router in routers]
        notes.append(
            f"gates point to the experts' prompts; the two that are most alike have cosine {max(closest):.3f}"
            + (": such experts are hard to tell apart, give prompts that differ more" if max(closest) > 0.99 else "")
        )
    return tuple(notes)


def _largest_cosine(weight_ED: Tensor) -> float:
    unit_ED = torch.nn.functional.normalize(weight_ED, dim=1)
    cosine = unit_ED @ unit_ED.T
    return float(cosine.fill_diagonal_(-1.0).max())
