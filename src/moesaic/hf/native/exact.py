"""Selection biases that a controller moves stay float32: steps of 0.001 vanish in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from moesaic.balance import BiasRule
from moesaic.hf.layers import moe_layers
from moesaic.hf.native.layer import NativeLayer
from moesaic.hf.native.table import Row, attribute


def make_exact(row: Row, router: nn.Module, block: nn.Module) -> None:
    """Make the selection bias of a router float32, in place; one that is as wide or wider stays as it is."""
    holder, name = _home(row, router, block)
    bias = cast(Tensor, getattr(holder, name))
    bias.data = bias.data.to(torch.promote_types(bias.dtype, torch.float32))


@contextmanager
def kept_exact(model: nn.Module) -> Iterator[None]:
    """Let a cast of the model within leave the biases that a controller moves their precision; devices may change."""
    before = {home: cast(Tensor, getattr(*home)).data for home in _steered(model)}
    yield
    for home, exact in before.items():
        bias = cast(Tensor, getattr(*home))
        if bias.dtype != exact.dtype:
            bias.data = exact.to(bias.device)


def _steered(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for layer in moe_layers(model).values():
        if isinstance(layer, NativeLayer) and any(isinstance(rule, BiasRule) for rule in layer.reporter.rules):
            yield _home(layer.reporter.adoption.row, layer.reporter, layer.block)


def _home(row: Row, router: nn.Module, block: nn.Module) -> tuple[nn.Module, str]:
    """The module that keeps a router's selection bias, and its name there."""
    assert row.selection_bias is not None
    holder = block if row.selection_bias.startswith("block.") else router
    inside, _, name = row.selection_bias.removeprefix("block.").rpartition(".")
    return (attribute(holder, inside) if inside else holder), name
