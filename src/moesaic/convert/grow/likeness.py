"""How a filled layer compares with the network that it takes the place of, tried on a small one of the same routing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.convert.layout.dense import run_dense
from moesaic.convert.layout.room import SMALL_HIDDEN, Fill, Filled, Room, network_tensors, shapes_of
from moesaic.convert.weights.parts import take
from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.context import Context
from moesaic.core.routing import Routing
from moesaic.kernels.activations import activation

_TOKENS = 64
_EXACT = 1e-9
"""How far a layer in float64 may be off and still be the network."""

ALIKE = 0.9
"""Least cosine between what layer and network give for one number to stand between them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """What a filled layer gives, as a multiple of what the dense network gives.

    Attributes:
        multiple: the number that comes closest over random tokens that experts serve.
        is_even: it is that number exactly, for every token.
        is_parallel: it is some number for each token that experts serve.
        cosine: between the two, the mean over tokens that experts serve.
    """

    multiple: float
    is_even: bool
    is_parallel: bool
    cosine: float


@torch.no_grad()
def likeness(room: Room, fill: Fill, num_neurons: int, router: Mapping[str, Tensor] | None = None) -> Likeness:
    """Fill a layer with a small network, and compare what the two give.

    The layer has the width, the router and the number of experts of the real one, and experts of width
    ``SMALL_HIDDEN``; all in float64. Half of the tokens are one and the same: a layer with a capacity drops some.

    Args:
        room: for the real layer.
        fill: what is tried.
        num_neurons: F of the small network, so that its parts are of width ``SMALL_HIDDEN``.
        router: tensors that the method sets, as for :meth:`Room.step`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(room.seed)
        ffn = _small_network(room, num_neurons)
        x_TD = torch.randn(_TOKENS, room.network.width, dtype=torch.float64)
        x_TD = torch.cat([x_TD, x_TD[:1].expand(_TOKENS, -1)])
    layer = filled_layer(room, fill, ffn, router, hidden=SMALL_HIDDEN)
    wanted_TD = run_dense(ffn, x_TD, activation(room.network.activation))
    options = room.spec.layers[room.network.path].options
    y_TD, _ = layer(x_TD, None, _context(len(x_TD), options))
    alone_TD, routing = layer(x_TD[:_TOKENS], None, _context(_TOKENS, options))
    return _compared(y_TD, wanted_TD, alone_TD, routing)


def unit(room: Room, router: Mapping[str, Tensor]) -> float:
    """The factor that makes up for the weights of a token: one over what they add up to, the mean over random tokens.

    Copies of one network, seen through the router, tell it. 1 where the layer mixes tokens, as in Soft MoE: there is no
    one factor to make up for.
    """

    def same(ffn: DenseFFN) -> Filled:
        return Filled(experts=take(ffn, torch.arange(SMALL_HIDDEN).expand(room.num_experts, -1)))

    alike = likeness(room, same, SMALL_HIDDEN, router)
    return neat(1 / alike.multiple) if alike.cosine > ALIKE else 1.0


def neat(factor: float) -> float:
    """A whole number, or one over it, as what it is up to rounding."""
    for near in (float(round(factor)), 1 / max(1, round(1 / factor))):
        if abs(factor - near) < _EXACT * factor:
            return near
    return factor


def filled_layer(
    room: Room, fill: Fill, ffn: DenseFFN, router: Mapping[str, Tensor] | None, *, hidden: int
) -> nn.Module:
    """A layer in evaluation mode, in the type of the network that fills it.

    Args:
        room: for the layer.
        fill: from the network to the layer's.
        ffn: the network.
        router: tensors that the method sets.
        hidden: F of one expert.
    """
    layer, fresh = room.built("cpu", hidden).to(ffn.up_DF.dtype), room.fresh(ffn.up_DF.dtype)
    state = fresh | {name: tensor.to(fresh[name].dtype) for name, tensor in (router or {}).items()}
    state |= network_tensors(shapes_of(layer), fill(ffn), ffn)
    layer.load_state_dict(state)
    return layer.eval()


@torch.no_grad()
def given(room: Room, layer: nn.Module, x_TD: Tensor) -> Tensor:
    """What a filled layer gives."""
    y_TD, _ = layer(x_TD, None, _context(len(x_TD), room.spec.layers[room.network.path].options))
    return cast(Tensor, y_TD)


def _compared(y_TD: Tensor, wanted_TD: Tensor, alone_TD: Tensor, routing: Routing) -> Likeness:
    first_TD = wanted_TD[:_TOKENS]
    scale = float(wanted_TD.abs().max())
    is_served_T = torch.zeros(_TOKENS, dtype=torch.bool)
    is_served_T[routing.token_N] = True
    is_served_T[routing.token_N[~routing.kept_N]] = False
    product_T1 = (alone_TD * first_TD).sum(1, keepdim=True)
    square_T1 = first_TD.square().sum(1, keepdim=True)
    multiple = float(product_T1[is_served_T].sum() / square_T1[is_served_T].sum())
    off_TD = (alone_TD - product_T1 / square_T1 * first_TD)[is_served_T]
    cosine = torch.nn.functional.cosine_similarity(alone_TD[is_served_T], first_TD[is_served_T])
    return Likeness(
        multiple=multiple,
        is_even=float((y_TD - multiple * wanted_TD).abs().max()) <= _EXACT * scale,
        is_parallel=not (off_TD.abs() > _EXACT * scale).any(),
        cosine=float(cosine.mean()),
    )


def _small_network(room: Room, hidden: int) -> DenseFFN:
    width, has_bias = room.network.width, bool(room.network.biases)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return DenseFFN(
        gate_DF=None if room.network.gate is None else draw(width, hidden) * width**-0.5,
        up_DF=draw(width, hidden) * width**-0.5,
        down_FD=draw(hidden, width),
        gate_F=draw(hidden) if has_bias else None,
        up_F=draw(hidden) if has_bias else None,
        down_D=draw(width) if has_bias else None,
    )


def _context(num_tokens: int, options: Mapping[str, Any]) -> Context:
    """One sequence with ids that any vocabulary has, for routers that ask."""
    zeros_T = torch.zeros(num_tokens, dtype=torch.int64)
    vocab_size = int(options.get("vocab_size") or num_tokens)
    return Context(sequence_T=zeros_T, id_T=torch.arange(num_tokens) % vocab_size, domain_T=zeros_T)
