"""Change what routers choose for a while: the means to ask what an expert is good for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.hf.block import SparseBlock
from moesaic.hf.interventions import Edits, Force, Intervention, Swap, SwitchOff
from moesaic.hf.layers import Block, blocks, moe_layers
from moesaic.hf.scope import editing, edits_now
from moesaic.hf.watching import adopted, places
from moesaic.layer import MoELayer
from moesaic.routers.groups import GroupLimit
from moesaic.routers.token_choice import TokenChoiceRouter
from moesaic.routers.top_k import TopKRouter

__all__ = ["Force", "Intervention", "Swap", "SwitchOff", "intervene"]


@contextmanager
def intervene(model: nn.Module, *interventions: Intervention) -> Iterator[None]:
    """Switch experts off, force them or swap them, in the forwards that start within; the model stays as it is.

    Only forwards in this thread are changed, those of ``generate`` and its cache too; others run the same model as it
    is meanwhile. A thread that is started within begins without. :func:`moesaic.record` sees the rows as they ran.
    Blocks within each other add up.

        with moesaic.hf.intervene(model, SwitchOff(layer=0, expert=3)):
            loss = model(**batch).loss

    Args:
        model: one that has MoE layers: ours, adopted, or one of transformers, which is adopted for the time of the
            block and left as it was after it. Adoption is seen by all threads: where several share such a model, call
            :func:`moesaic.adopt` first.
        interventions: what is done to which layers.
    Raises:
        ConfigError: before anything runs, naming the layer or expert that is not there, one that is asked for two
            things, a router that has too few experts left, or one whose choices cannot be given.
    """
    with adopted(model):
        places(model)  # refuses a model without layers
        asked = dict(edits_now())
        found, layers = blocks(model), moe_layers(model)
        named: dict[str, list[Intervention]] = {}
        for one in interventions:
            named.setdefault(_path(one, tuple(found)), []).append(one)
        for path, several in named.items():
            block, before = found[path], asked.get(found[path], ())
            wanted = (*before, *several)
            _check_experts(wanted, path, layers[path].num_experts)
            _check_block(block, Edits.of(wanted), path, layers[path].num_experts)
            asked[block] = wanted
        with editing(asked):
            yield


def _path(one: Intervention, paths: tuple[str, ...]) -> str:
    if isinstance(one.layer, str) and one.layer in paths:
        return one.layer
    if isinstance(one.layer, int) and not isinstance(one.layer, bool) and 0 <= one.layer < len(paths):
        return paths[one.layer]
    raise ConfigError(
        f"layer must be an index in 0..{len(paths) - 1} or the path of a MoE layer, got {one.layer!r}. "
        f"The first is {paths[0]!r}; moesaic.hf.moe_layers(model) lists them."
    )


def _check_experts(interventions: tuple[Intervention, ...], path: str, num_experts: int) -> None:
    """Refuse experts that are not there, and those of which two things are asked that exclude each other."""
    is_off: dict[int, bool] = {}
    for one in interventions:
        for expert in one.experts:
            if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < num_experts:
                raise ConfigError(f"expert must be in 0..{num_experts - 1} in layer {path}, got {expert!r}.")
            if isinstance(one, SwitchOff) and is_off.setdefault(expert, one.reroute) != one.reroute:
                raise ConfigError(
                    f"Expert {expert} of layer {path} is switched off with reroute=True and with reroute=False. "
                    "Use one of them."
                )
    for one in interventions:
        both = () if isinstance(one, SwitchOff) else tuple(expert for expert in one.experts if expert in is_off)
        if both:
            raise ConfigError(
                f"Expert {both[0]} of layer {path} is switched off and also named by {type(one).__name__}. "
                "Ask one thing of an expert."
            )
        if isinstance(one, Swap) and one.first == one.second:
            raise ConfigError(f"Swap needs two different experts in layer {path}, got {one.first} twice.")


def _check_block(block: Block, edits: Edits, path: str, num_experts: int) -> None:
    """Refuse a layer whose table cannot be changed in that way."""
    if isinstance(block, SparseBlock):
        if not isinstance(block.moe, MoELayer):
            raise ConfigError(
                f"An intervention needs a layer that routes by a table of rows, got {type(block.moe).__name__} at "
                f"{path}, whose experts are mixed and not chosen. Intervene in other layers."
            )
        router = block.moe.router
        if edits.chooses and not isinstance(router, TokenChoiceRouter):
            raise _no_choices(type(router).__name__, path)
        top_k = router.top_k if isinstance(router, TokenChoiceRouter) else 0
        groups = router.groups if isinstance(router, TopKRouter) else None
    else:
        spec = block.adoption.spec
        if not block.takes_choices:
            raise ConfigError(
                f"An intervention needs a router whose choices can be changed, got {type(block).__name__} at {path}, "
                "whose choices hang on a capacity or come from outside. Intervene in other layers."
            )
        if edits.closed and not spec.is_learned:
            raise _no_choices(type(block).__name__, path)
        top_k, groups = spec.top_k, spec.groups
    _check_room(edits, path, num_experts, top_k, groups)


def _no_choices(name: str, path: str) -> ConfigError:
    return ConfigError(
        f"This intervention needs a router in which each token takes its K best experts, got {name} at {path}. "
        "SwitchOff(..., reroute=False), which drops the expert's rows, and Swap work with it."
    )


def _check_room(edits: Edits, path: str, num_experts: int, top_k: int, groups: GroupLimit | None) -> None:
    if len(edits.forced) > top_k > 0:
        raise ConfigError(
            f"A token of layer {path} visits {top_k} experts, and {len(edits.forced)} are forced. Force fewer."
        )
    if not edits.closed:
        return
    num_groups, kept = (groups.num_groups, groups.groups_kept) if groups is not None else (1, 1)
    size = num_experts // num_groups
    left = sorted(size - sum(e // size == group for e in edits.closed) for group in range(num_groups))
    if sum(left[:kept]) < top_k:
        limit = "" if groups is None else f" in {kept} of its {num_groups} groups"
        raise ConfigError(
            f"Layer {path} needs top_k={top_k} experts to choose from{limit}, got {sum(left[:kept])} once "
            f"{len(edits.closed)} of {num_experts} are switched off. Switch off fewer, or use reroute=False."
        )
