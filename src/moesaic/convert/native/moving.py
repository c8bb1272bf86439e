"""Steps that carry MoE layers of ours over to the names and forms of a native family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moesaic.convert.checkpoint.blueprint import Blueprint
from moesaic.convert.checkpoint.source import Source
from moesaic.convert.layout.layouts import MoELayout, moe_layouts
from moesaic.convert.native.homes import Home
from moesaic.convert.steps import Step
from moesaic.convert.weights.stack import DenseFFN

# Granite keeps its shared expert beside the MoE block and not in it.
_BESIDE = "shared_mlp"
_GATE = "shared_expert_gate.weight"


def moving_steps(source: Source, home: Home, target: Blueprint) -> Iterator[Step]:
    """One step for each MoE layer, and one for each other tensor that gets another name.

    Args:
        source: a sparse model of ours.
        home: the family.
        target: the native model, whose MoE layers stand in the same order.
    """
    ours, native = moe_layouts(source.blueprint), moe_layouts(target)
    for (block, layout), (path, there) in zip(ours.items(), native.items(), strict=True):
        takes = tuple(name for name in source.names if name.startswith(f"{block}."))
        inside = (f"{path}.", f"{path.rpartition('.')[0]}.{_BESIDE}.")
        gives = tuple(name for name in target.tensors if name.startswith(inside))
        move = _Move(block=block, layout=layout, there=there, target=target, gives=gives)
        yield Step(takes=takes, gives=gives, run=move.weights, moments=move.moments)
    for name in source.names:
        new = home.renamed(name)
        if new != name and not name.startswith(tuple(f"{block}." for block in ours)):
            yield rename_step(name, new)


def beside_blocks(target: Blueprint) -> tuple[str, ...]:
    """Where tensors start that belong to MoE layers and stand beside their blocks."""
    found = {name[: name.index(f".{_BESIDE}.")] for name in target.tensors if f".{_BESIDE}." in name}
    return tuple(sorted(f"{home}.{_BESIDE}." for home in found))


def rename_step(old: str, new: str) -> Step:
    """A tensor that goes over under another name."""

    def run(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {new: tensors[old]}

    return Step(takes=(old,), gives=(new,), run=run, moments=run)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Move:
    """One MoE layer on its way.

    Attributes:
        block: where it stands with us.
        layout: what it is there.
        there: what it becomes.
        target: the native model.
        gives: the native layer's tensors.
    """

    block: str
    layout: MoELayout
    there: MoELayout
    target: Blueprint
    gives: tuple[str, ...]

    def weights(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The native layer's tensors."""
        return self._moved(tensors, doubles=True)

    def moments(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Their moments: an optimizer's step does not depend on the scale of both."""
        return self._moved(tensors, doubles=False)

    def _moved(self, tensors: Mapping[str, Tensor], *, doubles: bool) -> Mapping[str, Tensor]:
        given = self.there.write(self.layout.read(tensors))
        like = tensors[f"{self.block}.moe.router.weight"]
        for name in self.gives:
            if name in given:
                continue
            shape = self.target.tensors[name].shape
            found = self._router(name, tensors) if name in self.there.rows else self._shared(name, tensors, doubles)
            if found is None:
                # A bias that we do not have, or a shared expert that we do not have: there, and without an effect.
                dtype = torch.float32 if name in self.there.rows else like.dtype
                found = torch.zeros(shape, dtype=dtype, device=like.device)
            given[name] = found.reshape(shape).contiguous()
        return given

    def _router(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The map from tokens to logits, or the selection bias; None where we have no bias."""
        router = f"{self.block}.moe.router"
        return tensors.get(f"{router}.bias_E") if name.endswith("bias") else tensors[f"{router}.weight"]

    def _shared(self, name: str, tensors: Mapping[str, Tensor], doubles: bool) -> Tensor | None:
        """A tensor of the expert that every token visits; None where there is none, or no gate."""
        shared = self.layout.shared
        if shared is None:
            return None
        gate_D = tensors.get(shared.token_gate or "")
        if name.endswith(_GATE):
            return gate_D
        # A gate of zeros stands at one half, which the last map makes up for, exactly.
        is_half = gate_D is None and any(given.endswith(_GATE) for given in self.gives)
        factor = 2.0 if is_half and doubles else 1.0
        return _shared_map(shared.read(tensors), name.removesuffix(".weight").rpartition(".")[2], factor)


def _shared_map(ffn: DenseFFN, name: str, factor: float) -> Tensor:
    """One of a shared expert's maps under its native name; the last one times a factor."""
    gate_DF = cast(Tensor, ffn.gate_DF)
    if name == "gate_proj":
        return gate_DF.T
    if name == "up_proj":
        return ffn.up_DF.T
    if name == "input_linear":
        return torch.cat([gate_DF, ffn.up_DF], dim=1).T
    return ffn.down_FD.T * factor if factor != 1 else ffn.down_FD.T
