"""See that the experts that were asked for train, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.hf.peft.blocks import ExpertBlock, expert_blocks, home_of, modules_of
from moesaic.hf.peft.choice import CHOICE, Choice, Experts, Layers, Projections, choose
from moesaic.hf.peft.judge import ExpertTrains, judge
from moesaic.hf.peft.tokens import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCheck:
    """What :func:`check_trains` found; printed, one line.

    Attributes:
        rows: every (layer, expert, projection) that was asked for, in that order.
        others: names of parameters that train beside experts: routers, shared experts, attention.
        num_trainable: numbers that an optimizer steps, 0 or held at 0 ones among them.
    """

    rows: tuple[ExpertTrains, ...]
    others: tuple[str, ...]
    num_trainable: int

    @property
    def idle(self) -> tuple[ExpertTrains, ...]:
        """Those that got no tokens of the batch: try another batch, or a longer one."""
        return tuple(row for row in self.rows if row.is_idle)

    def __str__(self) -> str:
        trains = len(self.rows) - len(self.idle)
        text = f"{trains} of {len(self.rows)} projections of the chosen experts train, nothing else of any expert moves"
        if self.idle:
            experts = dict.fromkeys((row.layer, row.expert) for row in self.idle)
            shown = ", ".join(f"layer {layer} expert {expert}" for layer, expert in list(experts)[:5])
            more = f" and {len(experts) - 5} more" if len(experts) > 5 else ""
            text += f"; got no tokens: {shown}{more}"
        if self.others:
            text += f"; {len(self.others)} parameters beside experts train"
        return f"{text}; {self.num_trainable:,} trainable numbers."


def check_trains(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    layers: Layers | None = None,
    experts: Experts | None = None,
    projections: Projections | None = None,
) -> TrainingCheck:
    """Run one forward and backward, and see which experts a step of AdamW with weight decay would move.

    Gradients, random numbers and the model's mode are as before afterwards; no weight moves.

    Args:
        model: what :func:`lora` or :func:`train_only` made; with ``layers``, ``experts`` or ``projections`` any model.
        batch: what the model is called with, labels included.
        layers: what should train, as in :func:`lora`; left out with the next two, what the model was made for.
        experts: likewise.
        projections: likewise.
    Raises:
        ConfigError: if an expert that was asked for got tokens and no gradient, or is frozen; if anything else of an
            expert would move, or has moved already; if something trains that was not asked for. It names the first.
    """
    blocks = expert_blocks(model)
    remembered = cast("Choice | None", getattr(model, CHOICE, None))
    is_told = any(one is not None for one in (layers, experts, projections))
    if remembered is None and not is_told:
        raise ConfigError(
            "check_trains must be told which experts should train, for a model that neither moesaic.hf.lora nor "
            f"train_only made in this process, got {type(model).__name__} alone. Pass experts='all', or which."
        )
    choice = remembered
    if choice is None or is_told:
        choice = choose(
            blocks,
            layers="all" if layers is None else layers,
            experts="all" if experts is None else experts,
            projections="all" if projections is None else projections,
        )

    tokens = Tokens(blocks)
    with _undisturbed(model), tokens.counting(modules_of(model)):
        model.train()
        _backward(model, batch)
        rows = tuple(row for block in blocks for row in judge(model, block, choice, tokens))
        others = _others(model, blocks, choice, is_told=is_told)
    num_trainable = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return TrainingCheck(rows=rows, others=others, num_trainable=num_trainable)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter, _ in gradients if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


def _backward(model: nn.Module, batch: Mapping[str, Any]) -> None:
    with torch.enable_grad():
        loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ConfigError(
            f"check_trains needs a loss, and {type(model).__name__} gave none for {', '.join(batch)}. "
            "Put labels into the batch."
        )
    if not loss.requires_grad:
        raise ConfigError(
            f"check_trains needs something that trains, and all {sum(1 for _ in model.parameters())} parameters of "
            f"{type(model).__name__} are frozen. Read adapters with is_trainable=True, or call moesaic.hf.lora."
        )
    loss.backward()


def _others(model: nn.Module, blocks: Sequence[ExpertBlock], choice: Choice, *, is_told: bool) -> tuple[str, ...]:
    """Names of what trains beside experts; refuses what was not asked for, and what was and gets no gradient."""
    chosen = [blocks[layer] for layer in choice.experts]
    experts = {one.path for block in blocks for one in (*block.stacks, *block.biases)}
    experts |= {path for block in blocks for path in block.linears.values()}
    beside = [path for block in chosen for path in block.routers if choice.router]
    beside += [path for block in chosen for path in block.shared if choice.shared]
    beside += dict.fromkeys(path for block in chosen for path in block.attention if choice.attention)
    others, reached = [], set[str]()
    for name, parameter in model.named_parameters():
        home = home_of(name)
        if not parameter.requires_grad or home in experts:
            continue
        others.append(name)
        around = next((path for path in beside if f"{home}.".startswith(f"{path}.")), None)
        if around is None and not is_told:
            raise ConfigError(
                f"Only what was asked for should train, but {name} does too. Freeze it with requires_grad_(False), or "
                "ask for it: router, shared and attention say what trains beside experts."
            )
        if around is not None and parameter.grad is not None and bool(parameter.grad.any()):
            reached.add(around)
    silent = [path for path in beside if path not in reached]
    if silent and not is_told:
        raise ConfigError(
            f"{silent[0]} was asked to train and gets no gradient from this batch, nor do {len(silent) - 1} more such "
            "parts. See that its outputs reach the loss."
        )
    return tuple(others)
