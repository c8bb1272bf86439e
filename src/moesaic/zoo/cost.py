"""What a model costs because of its shape: FLOPs per token, bytes of cache, bytes of weights and optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from moesaic.core.errors import ConfigError
from moesaic.zoo import count
from moesaic.zoo.layers import (
    Attention,
    Dense,
    Experts,
    LatentAttention,
    Layer,
    LinearAttention,
    Lstm,
    Mamba,
    Mixer,
    Other,
)
from moesaic.zoo.parts import Parts

if TYPE_CHECKING:
    from moesaic.zoo.shape import ModelShape

BITS: Mapping[str, float] = {
    "fp32": 32,
    "bf16": 16,
    "fp16": 16,
    "fp8": 8,
    "int8": 8,
    # 4 bits each, and one 8-bit scale for 32 of them.
    "mxfp4": 4.25,
    "int4": 4,
}
# float32 numbers that an optimizer keeps for each weight.
STATES: Mapping[str, int] = {"adamw": 2, "momentum": 1, "sgd": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes by purpose, on one device and without activations.

    Args:
        weights: in their dtype.
        gradients: one for each weight, in its dtype.
        optimizer: float32 states, and the float32 copy of weights that are not.
        cache: keys, values, latents and states of sequences.
    """

    weights: int
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0

    @property
    def total(self) -> int:
        """All of them together."""
        return self.weights + self.gradients + self.optimizer + self.cache


def bits(dtype: str) -> float:
    """Bits of one number.

    Raises:
        ConfigError: for a dtype that is not known.
    """
    if dtype not in BITS:
        raise ConfigError(f"dtype must be one of {', '.join(BITS)}, got {dtype!r}. Choose one of them.")
    return BITS[dtype]


def memory(shape: ModelShape, *, dtype: str, train: bool, optimizer: str, context: int, sequences: int) -> Memory:
    """Bytes for weights and what is kept beside them; see :meth:`ModelShape.memory`."""
    if optimizer not in STATES:
        raise ConfigError(f"optimizer must be one of {', '.join(STATES)}, got {optimizer!r}. Choose one of them.")
    params = shape.num_params
    weights = round(params * bits(dtype) / 8)
    if not train:
        return Memory(weights=weights, cache=sequences * cache_bytes(shape, context, dtype))
    floats = STATES[optimizer] + (dtype != "fp32")
    return Memory(weights=weights, gradients=weights, optimizer=4 * floats * params)


def cache_bytes(shape: ModelShape, context: int, dtype: str) -> int:
    """Bytes that one sequence keeps; of an encoder-decoder the encoder's keys and values once more, as long."""
    numbers = sum(
        times * sum(cached_numbers(mixer, context) for mixer in layer.mixers)
        for layer, times in Counter(shape.layers).items()
    )
    return round(numbers * bits(dtype) / 8)


def cached_numbers(mixer: Mixer, context: int) -> int:
    """Numbers that what mixes positions keeps of ``context`` tokens."""
    match mixer:
        case Attention():
            return 2 * mixer.kv_heads * mixer.head_dim * min(context, mixer.window or context)
        case LatentAttention():
            return (mixer.kv_rank + mixer.rope_dim) * context
        case LinearAttention():
            return mixer.heads * mixer.head_dim**2
        case Mamba():
            return mixer.inner * (mixer.state + mixer.conv)
        case Lstm():
            return mixer.hidden + (mixer.projection or mixer.hidden)
        case Other():
            # What it keeps is not known.
            return 0
    assert_never(mixer)


def model_flops(shape: ModelShape, context: int, *, causal: bool) -> Parts:
    """Forward FLOPs of one token by part; see :meth:`ModelShape.flops_per_token`."""
    found = Parts(head=2 * shape.vocab * shape.width if shape.writes else 0, other=2 * shape.other_products)
    for layer, times in Counter(shape.encoder).items():
        # An encoder sees the whole source.
        found += layer_flops(layer, width=shape.width, context=context, causal=False) * times
    for layer, times in Counter(shape.layers).items():
        found += layer_flops(layer, width=shape.width, context=context, causal=causal) * times
    return found


def layer_flops(layer: Layer, *, width: int, context: int, causal: bool) -> Parts:
    """Forward FLOPs of one token in one layer, by part."""
    found = Parts(
        attention=sum(mixer_flops(mixer, width, context, causal=causal) for mixer in layer.mixers),
        other=2 * layer.extra_products,
    )
    for feed in layer.feeds:
        match feed:
            case Dense():
                found += Parts(dense=2 * count.network_params(width, feed.hidden, gated=feed.gated, bias=False))
            case Other():
                found += Parts(dense=2 * feed.matmul_params)
            case Experts():
                one = 2 * count.network_params(feed.width or width, feed.hidden, gated=feed.gated, bias=False)
                shared = 2 * count.network_params(width, feed.shared_hidden, gated=feed.gated, bias=False)
                bias = feed.num_experts * (feed.router_bias + feed.selection_bias)
                found += Parts(
                    experts=feed.top_k * one,
                    shared=shared + (2 * width if feed.shared_gate else 0),
                    routers=2 * (count.router_params(feed, width, active=True) - bias),
                )
            case _:
                assert_never(feed)
    return found


def mixer_flops(mixer: Mixer, width: int, context: int, *, causal: bool) -> int:
    """Forward FLOPs of one token in what mixes positions: its maps, and its products with other tokens."""
    match mixer:
        case Attention():
            inner = mixer.heads * mixer.head_dim
            maps = width * (inner * (3 if mixer.gated else 2) + 2 * mixer.kv_heads * mixer.head_dim)
            seen = _keys_seen(context, mixer.window, causal=causal and not mixer.cross)
            # Scores and the sum of values: 2 FLOPs a channel each.
            return 2 * maps + round(4 * inner * seen)
        case LatentAttention():
            norms = mixer.kv_rank + (mixer.q_rank or 0)
            key = mixer.nope_dim + mixer.rope_dim
            products = 2 * mixer.heads * (key + mixer.value_dim) * _keys_seen(context, None, causal=causal)
            return 2 * (count.mixer_params(mixer, width) - norms) + round(products)
        case LinearAttention():
            inner = mixer.heads * mixer.head_dim
            within = _keys_seen(min(context, mixer.block), None, causal=causal)
            # Products within a block, then the state read and written.
            return 10 * width * inner + round(4 * inner * within) + (4 * inner * mixer.head_dim if context else 0)
        case Mamba():
            inner, select = mixer.inner, mixer.dt_rank + 2 * mixer.state
            maps = 3 * width * inner + inner * select + mixer.dt_rank * inner
            # The convolution, and the state read out; how the state changes is worked out element by element.
            return 2 * (maps + inner * mixer.conv + inner * mixer.state)
        case Lstm():
            return 2 * count.mixer_params(mixer, width)
        case Other():
            return 2 * mixer.matmul_params
    assert_never(mixer)


def _keys_seen(context: int, window: int | None, *, causal: bool) -> float:
    """Keys that a token looks at, on average over a sequence where it may not look ahead."""
    if window is None or window >= context:
        return (context + 1) / 2 if causal and context else context
    if not causal:
        return window
    # The first `window` tokens see 1, 2, ... of them, the others all.
    return (window * (window + 1) / 2 + (context - window) * window) / context
