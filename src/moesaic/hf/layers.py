"""The MoE layers of a model: where they stand, what they weigh, what steers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from moesaic.balance import Controller
from moesaic.hf.block import SparseBlock
from moesaic.hf.native.blocks import JetMoeGate
from moesaic.hf.native.layer import NativeLayer
from moesaic.hf.native.router import AdoptedRouter, Reporter
from moesaic.hf.wrapped import plain_path
from moesaic.recipes.recipe import Layer
from moesaic.telemetry.summary import RoutingSummary

Block = SparseBlock | Reporter
"""What reports the routing of one MoE layer: a block of ours, or an adopted module of transformers."""


def blocks(model: nn.Module) -> dict[str, Block]:
    """What reports the routing of each MoE layer, by the layer's module path, in depth order."""
    # Where PEFT trains a copy of a router, both have one path, and the copy, which comes last, is the one that runs.
    return {
        _layer_path(plain_path(path), part): part for path, part in model.named_modules() if isinstance(part, Block)
    }


def moe_layers(model: nn.Module) -> dict[str, Layer | NativeLayer]:
    """The MoE layers of a model by module path, in depth order: ours, or what adopted ones show of themselves."""
    return {
        path: part.moe if isinstance(part, SparseBlock) else NativeLayer(part, _around(model, path, part))
        for path, part in blocks(model).items()
    }


def is_sparse(model: nn.Module) -> bool:
    """Whether a model has MoE layers that we see: ours, or adopted ones."""
    return any(isinstance(module, Block) for module in model.modules())


def _layer_path(path: str, part: nn.Module) -> str:
    """A router goes by the name of the layer that it stands in."""
    return path.rpartition(".")[0] if isinstance(part, AdoptedRouter | JetMoeGate) else path


def _around(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    return model.get_submodule(path) if isinstance(part, AdoptedRouter | JetMoeGate) else part


def active_params(model: nn.Module) -> int:
    """Parameters that one token meets: all of the model but the experts that it does not choose."""
    idle = sum(layer.num_params - layer.num_active_params for layer in moe_layers(model).values())
    return sum(parameter.numel() for parameter in model.parameters()) - idle


@dataclass(frozen=True, kw_only=True, slots=True)
class Steered:
    """A controller and the layers whose counts it is stepped on, by module path, in depth order."""

    layers: tuple[str, ...]
    controller: Controller

    def step(self, seen: Mapping[str, RoutingSummary]) -> None:
        """Step the controller once on what its layers did in one optimizer step; not at all if they did not run.

        Args:
            seen: by layer, summed over micro-batches and ranks.
        """
        if not all(layer in seen for layer in self.layers):
            return
        summaries = [seen[layer] for layer in self.layers]
        device = summaries[0].load_E.device
        self.controller.step(
            torch.cat([summary.load_E.to(device) for summary in summaries]),
            kept_E=torch.cat([summary.kept_E.to(device) for summary in summaries]),
            num_tokens=sum(int(summary.num_tokens) for summary in summaries),
        )


def controllers(model: nn.Module) -> list[Steered]:
    """What balances the layers of a model without a gradient: one controller for each layer, or for all of them.

    Step each once per optimizer step, on the counts of everything that the step saw.
    """
    found, layers = blocks(model), moe_layers(model)
    rules = list(dict.fromkeys(rule for block in found.values() for rule in block.rules))
    steered = []
    for rule in rules:
        paths = [path for path, block in found.items() if rule in block.rules]
        built = rule.build([cast(nn.Module, layers[path]) for path in paths])
        groups = [(path,) for path in paths] if len(built) == len(paths) else [tuple(paths)]
        for group, controller in zip(groups, built, strict=True):
            layer = layers[group[0]]
            one = layer.pinned(controller) if isinstance(layer, NativeLayer) else controller
            steered.append(Steered(layers=group, controller=one))
    return steered
