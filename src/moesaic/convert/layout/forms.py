"""The forms in which models keep their experts' weights, and the one form that conversions work on.

A form is recognised by the tensors of an experts module, whatever its class is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moesaic.convert.weights.stack import DenseFFN, ExpertStack

Read = Callable[[Mapping[str, Tensor]], ExpertStack]
Write = Callable[[ExpertStack], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How one experts module keeps its weights. Names are relative to it.

    Attributes:
        num_experts: E.
        names: its tensors, all of which have an expert dimension or belong to one expert.
        read: from tensors by name to the stack; views where it can.
        write: from a stack of any number of experts to tensors by name.
    """

    num_experts: int
    names: tuple[str, ...]
    read: Read
    write: Write


def form_of(experts: nn.Module) -> Form | None:
    """Recognise a module's form; None if it holds no experts.

    Covers our own experts, every family that uses transformers' experts interface, Llama 4, DBRX, JetMoE's
    feed-forward experts, and modules of one child for each expert (Switch, NLLB).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in experts.named_parameters()}
    own = {name for name in shapes if "." not in name}
    if {"up_EDF", "down_EFD"} <= own:
        return _ours(shapes)
    if "down_proj" in own and len(shapes["down_proj"]) == 3 and own & {"gate_up_proj", "up_proj"}:
        return _stacked(experts, shapes)
    if own == set() and set(shapes) == {"mlp.w1", "mlp.v1", "mlp.w2"}:
        return _flat(cast(int, experts.num_experts), shapes)
    if shapes and all(re.match(r"expert_\d+\.", name) for name in shapes):
        return _children(shapes)
    return None


_OURS = {
    "gate_EDF": "gate_EDF",
    "up_EDF": "up_EDF",
    "down_EFD": "down_EFD",
    "gate_bias_EF": "gate_EF",
    "up_bias_EF": "up_EF",
    "down_bias_ED": "down_ED",
}


def _ours(shapes: Mapping[str, tuple[int, ...]]) -> Form | None:
    if not set(shapes) <= set(_OURS):
        return None
    fields = {name: _OURS[name] for name in shapes}

    def read(tensors: Mapping[str, Tensor]) -> ExpertStack:
        parts = {field: tensors[name] for name, field in fields.items()}
        return ExpertStack(gate_EDF=parts.pop("gate_EDF", None), **parts)

    def write(stack: ExpertStack) -> dict[str, Tensor]:
        return {name: getattr(stack, field).contiguous() for name, field in fields.items()}

    return Form(num_experts=shapes["up_EDF"][0], names=tuple(fields), read=read, write=write)


def _stacked(experts: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Form | None:
    """Three dimensions: gate and up in one, side by side or column by column, or only up; transposed or not."""
    has_gate = "gate_up_proj" in shapes
    up = "gate_up_proj" if has_gate else "up_proj"
    biases = tuple(name for name in (f"{up}_bias", "down_proj_bias") if name in shapes)
    if set(shapes) != {up, "down_proj", *biases} or len(biases) == 1:
        return None
    num_experts = shapes["down_proj"][0]
    if shapes[up][0] != num_experts:
        return None
    # (E, F, D) as our own, or (E, D, F) as nn.Linear has it. Where D == F the shapes do not tell: the class does.
    is_transposed = bool(getattr(experts, "is_transposed", shapes[up][1] == shapes["down_proj"][2]))
    is_concatenated = bool(getattr(experts, "is_concatenated", True))

    def turn(tensor: Tensor) -> Tensor:
        return tensor if is_transposed else tensor.transpose(1, 2)

    def halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
        if is_concatenated:
            gate, up = tensor.chunk(2, dim=-1)
            return gate, up
        return tensor[..., ::2], tensor[..., 1::2]

    def both(gate: Tensor, up: Tensor) -> Tensor:
        return torch.cat([gate, up], dim=-1) if is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)

    def read(tensors: Mapping[str, Tensor]) -> ExpertStack:
        parts: dict[str, Tensor | None] = {"gate_EDF": None, "down_EFD": turn(tensors["down_proj"])}
        if has_gate:
            parts["gate_EDF"], parts["up_EDF"] = halves(turn(tensors[up]))
        else:
            parts["up_EDF"] = turn(tensors[up])
        if biases:
            parts["down_ED"] = tensors["down_proj_bias"]
            if has_gate:
                parts["gate_EF"], parts["up_EF"] = halves(tensors[biases[0]])
            else:
                parts["up_EF"] = tensors[biases[0]]
        return ExpertStack(**parts)  # type: ignore[arg-type]

    def write(stack: ExpertStack) -> dict[str, Tensor]:
        joined = both(cast(Tensor, stack.gate_EDF), stack.up_EDF) if has_gate else stack.up_EDF
        given = {up: turn(joined).contiguous(), "down_proj": turn(stack.down_EFD).contiguous()}
        if biases:
            up_EF = cast(Tensor, stack.up_EF)
            given[biases[0]] = both(cast(Tensor, stack.gate_EF), up_EF) if has_gate else up_EF.contiguous()
            given["down_proj_bias"] = cast(Tensor, stack.down_ED).contiguous()
        return given

    return Form(num_experts=num_experts, names=(up, "down_proj", *biases), read=read, write=write)


def _flat(num_experts: int, shapes: Mapping[str, tuple[int, ...]]) -> Form:
    """DBRX: all experts below each other, (E F, D), the last map transposed."""

    def read(tensors: Mapping[str, Tensor]) -> ExpertStack:
        stacks = (tensors[name] for name in ("mlp.w1", "mlp.v1", "mlp.w2"))
        gate, up, down = (stack.view(num_experts, -1, stack.shape[1]) for stack in stacks)
        return ExpertStack(gate_EDF=gate.transpose(1, 2), up_EDF=up.transpose(1, 2), down_EFD=down)

    def write(stack: ExpertStack) -> dict[str, Tensor]:
        gate_EDF = cast(Tensor, stack.gate_EDF)
        return {
            "mlp.w1": gate_EDF.transpose(1, 2).flatten(0, 1).contiguous(),
            "mlp.v1": stack.up_EDF.transpose(1, 2).flatten(0, 1).contiguous(),
            "mlp.w2": stack.down_EFD.flatten(0, 1).contiguous(),
        }

    return Form(num_experts=num_experts, names=tuple(shapes), read=read, write=write)


def _children(shapes: Mapping[str, tuple[int, ...]]) -> Form | None:
    """One child for each expert, of two linear maps with or without biases (Switch: wi, wo; NLLB: fc1, fc2)."""
    parts = list(dict.fromkeys(name.split(".")[1] for name in shapes))
    if parts not in (["wi", "wo"], ["fc1", "fc2"]):
        return None
    first, last = parts
    has_bias = f"expert_0.{first}.bias" in shapes

    def one(tensors: Mapping[str, Tensor], index: int) -> DenseFFN:
        home = f"expert_{index}"
        return DenseFFN(
            gate_DF=None,
            up_DF=tensors[f"{home}.{first}.weight"].T,
            down_FD=tensors[f"{home}.{last}.weight"].T,
            up_F=tensors[f"{home}.{first}.bias"] if has_bias else None,
            down_D=tensors[f"{home}.{last}.bias"] if has_bias else None,
        )

    def read(tensors: Mapping[str, Tensor]) -> ExpertStack:
        count = len({name.split(".")[0] for name in tensors})
        return ExpertStack.of([one(tensors, index) for index in range(count)])

    def write(stack: ExpertStack) -> dict[str, Tensor]:
        given = {}
        for index in range(stack.num_experts):
            expert, home = stack.expert(index), f"expert_{index}"
            given[f"{home}.{first}.weight"] = expert.up_DF.T.contiguous()
            given[f"{home}.{last}.weight"] = expert.down_FD.T.contiguous()
            if has_bias:
                given[f"{home}.{first}.bias"] = cast(Tensor, expert.up_F).contiguous()
                given[f"{home}.{last}.bias"] = cast(Tensor, expert.down_D).contiguous()
        return given

    count = len({name.split(".")[0] for name in shapes})
    return Form(num_experts=count, names=tuple(shapes), read=read, write=write)
