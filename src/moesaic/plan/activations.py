"""What the forward of a layer keeps for its backward, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from moesaic.core.errors import ConfigError
from moesaic.zoo import (
    Attention,
    Dense,
    Experts,
    LatentAttention,
    Layer,
    LinearAttention,
    Lstm,
    Mamba,
    ModelShape,
    Other,
    cost,
)
from moesaic.zoo.layers import Feed, Mixer


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Bytes that are alive between forward and backward.

    Attributes:
        token: for each token, whatever its experts.
        row: for each row of a mixture, which is one token at one expert.
    """

    token: float = 0.0
    row: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(token=self.token + other.token, row=self.row + other.row)


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """How a model's operations are written, which decides what each has to keep.

    Attributes:
        fused: whether norms, activations and the loss are one operation each, which keeps its input alone; otherwise
            they are what plain PyTorch in transformers does, operation by operation. Either way attention keeps no
            scores and experts run as grouped products.
        dtype: of activations.
    """

    fused: bool = True
    dtype: str = "bf16"

    @property
    def bytes(self) -> float:
        """Of one number."""
        return cost.bits(self.dtype) / 8


def layer_kept(layer: Layer, width: int, code: Code) -> Kept:
    """What one layer keeps of a token, and of a row of its mixture.

    Raises:
        ConfigError: if it has a mixer that only the weights are known of.
    """
    # A norm: its input, which is the residual stream; what it gives; and what is scaled last, if that is one more.
    numbers = layer.norms * width * (2 if code.fused else 3)
    kept = Kept(token=numbers * code.bytes)
    for mixer in layer.mixers:
        kept += _mixer_kept(mixer, width, code)
    for feed in layer.feeds:
        kept += _feed_kept(feed, width, code)
    return kept


def input_kept(width: int, code: Code) -> Kept:
    """What is kept of a layer that is computed anew in the backward: its input."""
    return Kept(token=width * code.bytes)


def head_kept(shape: ModelShape, code: Code) -> float:
    """Bytes for each token of the last norm, the logits and the loss, at their most.

    Fused, the loss keeps logits in their dtype and one float32 copy that becomes the gradient. In plain PyTorch, when
    the backward begins, the logarithmic softmax, its gradient and that of the logits are there together in float32.
    """
    norms = shape.final_norms * shape.width * (2 if code.fused else 3) * code.bytes
    return norms + shape.vocab * (code.bytes + 4 if code.fused else 12)


def working(layer: Layer, width: int, tokens: float, rows: float, code: Code) -> float:
    """Bytes that the backward of a layer has in hand beside what was kept, at its widest place.

    Fused, gradients are added up where they belong, and rows have those of their input and of what is inside. In plain
    PyTorch a gradient of weights is made first and added then; but what has been used is let go, too. Its widest places
    are where outputs are weighed, and the products of either map.

    Args:
        layer: of the model.
        width: of the model.
        tokens: of all micro-batches that are worked on at once.
        rows: of them.
        code: of the layer.
    """
    widest = [_working(feed, width, rows if isinstance(feed, Experts) else tokens, code) for feed in layer.feeds]
    return max(widest, default=0.0)


def _working(feed: Feed, width: int, rows: float, code: Code) -> float:
    if isinstance(feed, Other):
        raise _unknown(feed)
    width = (feed.width or width) if isinstance(feed, Experts) else width
    into = 2 if feed.gated else 1
    if code.fused:
        return rows * (width + (into + 1) * feed.hidden) * code.bytes
    experts = feed.num_experts if isinstance(feed, Experts) else 1
    weights = experts * feed.hidden * width
    outputs = 3 * rows * width if isinstance(feed, Experts) else 0
    second = rows * feed.hidden + weights
    # Here the product, the activation and the output are gone already.
    first = into * weights + rows * (into * feed.hidden + width) - rows * (2 * into * feed.hidden + width)
    return max(outputs, second, first) * code.bytes


def _network(hidden: int, *, gated: bool, code: Code) -> int:
    """Numbers inside a feed-forward network: what its maps give, their activation, and the product of both."""
    if not gated:
        return 2 * hidden
    return (3 if code.fused else 4) * hidden


def _feed_kept(feed: Feed, width: int, code: Code) -> Kept:
    match feed:
        case Dense():
            return Kept(token=_network(feed.hidden, gated=feed.gated, code=code) * code.bytes)
        case Experts():
            # Scores before and after their normalisation, in float32.
            scores = 2 * feed.num_experts * 4
            shared = _network(feed.shared_hidden, gated=feed.gated, code=code) + (width if feed.shared_gate else 0)
            # A row's input, gathered, and its output, which the gradient of its weight needs.
            row = 2 * (feed.width or width) + _network(feed.hidden, gated=feed.gated, code=code)
            return Kept(token=scores + shared * code.bytes, row=row * code.bytes)
        case Other():
            raise _unknown(feed)
    assert_never(feed)


def _mixer_kept(mixer: Mixer, width: int, code: Code) -> Kept:
    match mixer:
        case Attention():
            query, key = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
            # Queries, keys, values, what comes out, and the softmax's float32 normaliser for each head.
            numbers = 2 * query + 2 * key
            if mixer.qk_norm != "none":
                numbers += (query + key) * (1 if code.fused else 2)
            if mixer.gated:
                numbers += 2 * query
            return Kept(token=numbers * code.bytes + 4 * mixer.heads)
        case LatentAttention():
            return Kept(token=_latent_numbers(mixer, code) * code.bytes + 4 * mixer.heads)
        case LinearAttention():
            # Queries, keys, values, the gate, and the output before and after it.
            return Kept(token=6 * mixer.heads * mixer.head_dim * code.bytes)
        case Mamba():
            # Both halves of the input map, the convolution's output, step sizes, and the scan's output.
            return Kept(token=(5 * mixer.inner + mixer.dt_rank + 2 * mixer.state) * code.bytes)
        case Lstm():
            # Four gates, the cell, its squashed value.
            return Kept(token=(6 * mixer.hidden + (mixer.projection or 0)) * code.bytes)
        case Other():
            raise _unknown(mixer)
    assert_never(mixer)


def _unknown(part: Other) -> ConfigError:
    return ConfigError(
        f"What {part.name} keeps for the backward is not known: only its weights were counted. "
        "Plan for serving, or give a model whose layers the zoo knows."
    )


def _latent_numbers(mixer: LatentAttention, code: Code) -> int:
    key = mixer.nope_dim + mixer.rope_dim
    norm = 2 if code.fused else 3
    latents = norm * mixer.kv_rank + mixer.rope_dim + norm * (mixer.q_rank or 0)
    # Queries and keys put together from two parts, the map that gives keys and values, and the output; in plain
    # PyTorch, heads put together stand in another order in memory, and the output is copied for the map back.
    outputs = 2 if code.fused else 3
    return latents + mixer.heads * (2 * key + mixer.nope_dim + outputs * mixer.value_dim)
