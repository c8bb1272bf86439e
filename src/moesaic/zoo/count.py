"""How many weights: one function from a layer, and one from a model, to a count by part."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, assert_never

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


def model_params(shape: ModelShape, *, active: bool = False) -> Parts:
    """Count a model's weights by part.

    Args:
        shape: of the model.
        active: count what works on one token: of the experts only those that it passes. Everything else counts in full,
            the embeddings too.
    """
    norm = shape.norm_params
    found = Parts(
        embeddings=(shape.vocab + shape.positions) * shape.width + shape.embedding_extra,
        norms=shape.final_norms * norm,
        head=(0 if shape.tied else shape.vocab * shape.width) + (shape.vocab if shape.head_bias else 0),
        other=shape.other + (0 if active else shape.towers),
    )
    # Layers of a model are alike but for a few: each kind is counted once.
    for layer, times in Counter((*shape.encoder, *shape.layers)).items():
        found += layer_params(layer, width=shape.width, norm=norm, active=active) * times
    return found


def layer_params(layer: Layer, *, width: int, norm: int, active: bool = False) -> Parts:
    """Count one layer's weights by part.

    Args:
        layer: to count.
        width: D of the model.
        norm: weights of one norm over it.
        active: count of the experts only those that a token passes.
    """
    found = Parts(
        attention=sum(mixer_params(mixer, width, active=active) for mixer in layer.mixers),
        norms=layer.norms * norm,
        other=layer.extra,
    )
    for feed in layer.feeds:
        match feed:
            case Dense():
                found += Parts(dense=network_params(width, feed.hidden, gated=feed.gated, bias=feed.bias))
            case Experts():
                found += _mixture_params(feed, width, active=active)
            case Other():
                found += Parts(dense=feed.active_params if active else feed.params)
            case _:
                assert_never(feed)
    return found


def _mixture_params(feed: Experts, width: int, *, active: bool) -> Parts:
    shared = 0
    if feed.shared_hidden:
        shared = network_params(width, feed.shared_hidden, gated=feed.gated, bias=feed.bias)
    return Parts(
        experts=(feed.top_k if active else feed.num_experts) * expert_params(feed, width),
        shared=shared + (width if feed.shared_gate else 0) + feed.shared_extra,
        routers=router_params(feed, width, active=active),
    )


def expert_params(feed: Experts, width: int) -> int:
    """Count the weights of one routed expert."""
    width = width if feed.width is None else feed.width
    return network_params(width, feed.hidden, gated=feed.gated, bias=feed.bias) + feed.expert_extra


def router_params(feed: Experts, width: int, *, active: bool = False) -> int:
    """Count the weights of a mixture's router; of a tree's lower level, a token passes the branches that it chose."""
    flat = feed.num_experts
    if feed.tree:
        # Two of the first level's branches, and two experts in each (Shazeer et al. 2017, appendix B).
        flat = feed.tree + (2 * feed.num_experts // feed.tree if active else feed.num_experts)
    biases = feed.num_experts * (feed.router_bias + feed.selection_bias)
    return feed.router_maps * width * flat + biases + feed.router_extra


def network_params(width: int, hidden: int, *, gated: bool, bias: bool) -> int:
    """Count the weights of a feed-forward network of two maps, or three."""
    into = 2 if gated else 1
    return (into + 1) * width * hidden + (into * hidden + width if bias else 0)


def mixer_params(mixer: Mixer, width: int, *, active: bool = False) -> int:
    """Count the weights of what mixes positions; ``active`` matters where it routes too."""
    match mixer:
        case Attention():
            return _attention_params(mixer, width)
        case LatentAttention():
            heads, rank = mixer.heads, mixer.kv_rank
            key = mixer.nope_dim + mixer.rope_dim
            queries = width * heads * key
            if mixer.q_rank is not None:
                queries = width * mixer.q_rank + mixer.q_rank + mixer.q_rank * heads * key
            latent = width * (rank + mixer.rope_dim) + rank
            return (
                queries + latent + rank * heads * (mixer.nope_dim + mixer.value_dim) + heads * mixer.value_dim * width
            )
        case LinearAttention():
            # Queries, keys, values, an output gate, a norm over all heads, and the map back.
            inner = mixer.heads * mixer.head_dim
            return 5 * width * inner + inner
        case Mamba():
            return _mamba_params(mixer, width)
        case Lstm():
            given = mixer.projection or mixer.hidden
            return 4 * mixer.hidden * (width + given) + (mixer.hidden * given if mixer.projection else 0)
        case Other():
            return mixer.active_params if active else mixer.params
    assert_never(mixer)


def _attention_params(mixer: Attention, width: int) -> int:
    query, key = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    asked = query * (2 if mixer.gated else 1)
    weights = width * (asked + 2 * key) + query * width
    biases = (asked + 2 * key if mixer.qkv_bias else 0) + (width if mixer.out_bias else 0)
    norms = {"none": 0, "head": 2 * mixer.head_dim, "full": query + key}[mixer.qk_norm]
    return weights + biases + norms + (mixer.heads if mixer.sinks else 0) + mixer.buckets * mixer.heads


def _mamba_params(mixer: Mamba, width: int) -> int:
    inner, state = mixer.inner, mixer.state
    into = width * 2 * inner
    conv = inner * mixer.conv + inner
    select = inner * (mixer.dt_rank + 2 * state) + mixer.dt_rank * inner + inner
    norms = mixer.dt_rank + 2 * state if mixer.norms else 0
    # A per state, D per channel.
    return into + conv + select + norms + inner * state + inner + inner * width
