"""Whether a backward that has just run would train the chosen experts of a block, and would leave the others alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from moesaic.core.errors import ConfigError
from moesaic.hf.peft.blocks import ExpertBlock, Stack, modules_of, weights_of
from moesaic.hf.peft.changes import Change, ChosenChange, LowRankChange, WholeChange, stepped
from moesaic.hf.peft.choice import Choice
from moesaic.hf.peft.limits import pair
from moesaic.hf.peft.lora import wrappers
from moesaic.hf.peft.only import OnlyChosen
from moesaic.hf.peft.tokens import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTrains:
    """What a batch does to one projection of one expert.

    Attributes:
        layer: index of the MoE layer.
        path: of its block.
        expert: which expert.
        projection: "gate", "up" or "down".
        tokens: of the batch that it worked on and that the loss depends on; None if that cannot be told.
        gradient: the norm of the gradient that reaches its weights through what trains.
    """

    layer: int
    path: str
    expert: int
    projection: str
    tokens: int | None
    gradient: float

    @property
    def is_idle(self) -> bool:
        """Whether no token came, so that this batch says nothing about it."""
        return self.tokens == 0

    def __str__(self) -> str:
        return f"layer {self.layer} ({self.path}), expert {self.expert}, {self.projection}"


def judge(model: nn.Module, block: ExpertBlock, choice: Choice, tokens: Tokens) -> Iterator[ExpertTrains]:
    """What a backward did to the chosen experts of one block.

    Args:
        model: with gradients.
        block: experts.
        choice: what should train.
        tokens: what its experts worked on.
    Raises:
        ConfigError: if a chosen one that got tokens does not train, or another one of the block would move.
    """
    experts, load_E = choice.experts.get(block.index, ()), tokens.load_E(block.index)
    norms: dict[tuple[int, str], float] = {}
    changes = changes_of(model, block)
    for stack in block.stacks:
        if stack.full_name in changes:
            asked = [(expert, one) for expert in experts for one in choice.projections]
            norms |= _norms(block, stack, changes[stack.full_name], asked)
    for (expert, projection), path in block.linears.items():
        if path in changes:
            whole = Stack(path=path, name="weight", dim=1, where={projection: slice(None)})
            asked = [(expert, projection)] if expert in experts and projection in choice.projections else []
            norms |= _norms(block, whole, changes[path], asked, only=expert)
    for expert in experts:
        for projection in (one for one in choice.projections if one in block.projections):
            row = ExpertTrains(
                layer=block.index,
                path=block.path,
                expert=expert,
                projection=projection,
                tokens=None if load_E is None else int(load_E[expert]),
                gradient=norms.get((expert, projection), 0.0),
            )
            _require_training(
                row, is_frozen=(expert, projection) not in norms, is_cut_off=tokens.is_cut_off(block.index)
            )
            yield row


def changes_of(model: nn.Module, block: ExpertBlock) -> dict[str, Change]:
    """How the experts of a block are trained, by full name of a stack or path of a linear map; frozen ones left out."""
    modules = modules_of(model)
    adapters = wrappers(model)
    found: dict[str, Change] = {}
    holders = [(one.full_name, one.path, one.name) for one in block.stacks]
    holders += [(path, path, "weight") for path in block.linears.values()]
    for key, path, name in holders:
        module = modules[path]
        weight = weights_of(module)[name]
        if key in adapters:
            layer = adapters[key]
            for adapter in layer.active_adapters:
                if adapter in layer.r and pair(layer, adapter)[1].requires_grad:
                    found[key] = LowRankChange(layer, adapter)
        elif parametrize.is_parametrized(module, name):
            lists = cast(nn.ModuleDict, module.parametrizations)
            found[key] = ChosenChange(cast(OnlyChosen, cast(nn.ModuleList, lists[name])[0]))
        elif weight.requires_grad:
            found[key] = WholeChange(weight)
    return found


@torch.no_grad()
def _norms(
    block: ExpertBlock, stack: Stack, change: Change, asked: list[tuple[int, str]], *, only: int | None = None
) -> dict[tuple[int, str], float]:
    """The norm of what reaches each projection that was asked for; refuses a step that would move another.

    In float32 and more: in bfloat16 a small step would be rounded away and seem to be none.
    """
    values = [one.detach().float() for one in change.parameters]
    slopes = [torch.zeros_like(one) if one.grad is None else one.grad.float() for one in change.parameters]
    after = stepped(values, slopes)
    norms: dict[tuple[int, str], float] = {}
    for expert in range(block.num_experts) if only is None else [only]:
        before = change.part(values, expert)
        moved, slope = change.part(after, expert) - before, change.slope(values, slopes, expert)
        for projection, places in stack.where.items():
            at = (places, slice(None)) if stack.dim == 1 else (slice(None), places)
            if (expert, projection) in asked:
                norms[expert, projection] = float(slope[at].norm())
                continue
            name = f"layer {block.index} ({block.path}), expert {expert}, {projection}"
            if isinstance(change, LowRankChange) and bool(before[at].any()):
                raise ConfigError(
                    f"Only chosen experts should have changed, but the adapter changes {name}, which is not one, by "
                    f"{float(before[at].abs().max()):.3g} in {stack.full_name}. It was trained without "
                    "moesaic.hf.lora: choose what it has, or start again."
                )
            if bool(moved[at].any()):
                raise ConfigError(
                    f"Only chosen experts should move, but a step of AdamW would move {name}, which is not one, by "
                    f"{float(moved[at].abs().max()):.3g} in {stack.full_name}. {_HOLD}"
                )
        is_chosen = any((expert, projection) in asked for projection in stack.where)
        if not is_chosen and isinstance(change, LowRankChange) and not change.is_at_rest(values, expert):
            raise ConfigError(
                f"Only chosen experts should move, but {stack.full_name} has an adapter for expert {expert} of layer "
                f"{block.index}, which is not one: this batch would not move it, another one would. {_HOLD}"
            )
    return norms


_HOLD = "Choose experts with moesaic.hf.lora or moesaic.hf.train_only, which hold the others."


def _require_training(row: ExpertTrains, *, is_frozen: bool, is_cut_off: bool) -> None:
    if is_frozen:
        raise ConfigError(
            f"{row} was asked to train and is frozen: no adapter reaches it and its own weights do not train. Name "
            "its parameter in target_parameters, not target_modules, or use moesaic.hf.lora."
        )
    if is_cut_off:
        raise ConfigError(
            f"{row} was asked to train, but the loss depends on nothing that the experts of its layer return for this "
            "batch. See that nothing detaches their outputs, and that some tokens have labels."
        )
    if row.gradient > 0 or row.is_idle:
        return
    tokens = "an unknown number of" if row.tokens is None else row.tokens
    raise ConfigError(
        f"{row} was asked to train and got {tokens} tokens of the batch but no gradient. See that the layer calls its "
        "experts rather than reads their weights."
    )
