"""From the weights of one layer to what the layer is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from moesaic.hf.native.router_spec import RouterSpec
from moesaic.hf.shape.weights import LayerWeights, Mixture, Weights, in_products, numel
from moesaic.layer import MoELayer, Router
from moesaic.zoo import Attention, Dense, Experts, LatentAttention, Layer, LinearAttention, Mamba, Other
from moesaic.zoo.count import layer_params, mixer_params, network_params
from moesaic.zoo.layers import Feed, Mixer


def layer_of(module: nn.Module, weights: LayerWeights, *, width: int, norm: int) -> Layer:
    """What a layer is made of; whatever has no form of the zoo's keeps its number of weights.

    Args:
        module: the layer.
        weights: sorted.
        width: D of the model.
        norm: weights of one norm over it.
    """
    feeds: list[Feed] = [dense_of(path, held, width) for path, held in weights.feeds.items()]
    feeds += [one for mixture in weights.mixtures for one in _mixture_feeds(mixture, width)]
    feeds += [feed for moe, held in weights.blocks for feed in _own_feeds(moe, held, width)]
    mixers = [
        mixer_of(module.get_submodule(path), held, width, weights.routed_mixers.get(path))
        if isinstance(_at(module, path), nn.Module)
        else _other(path, held)
        for path, held in weights.mixers.items()
    ]
    norms, over = divmod(numel(weights.norms), norm) if norm else (0, numel(weights.norms))
    return Layer(
        mixers=tuple(mixers),
        feeds=tuple(feeds),
        norms=norms,
        extra=numel(weights.other) + over,
        extra_products=in_products(weights.other),
    )


def _at(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def dense_of(path: str, weights: Weights, width: int) -> Feed:
    """A dense feed-forward network of two maps or three, if its weights are exactly those."""
    for gated in (True, False):
        for hidden in _sizes(weights.values()):
            for bias in (False, True):
                if network_params(width, hidden, gated=gated, bias=bias) == numel(weights):
                    return Dense(hidden=hidden, gated=gated, bias=bias)
    return _other(path, weights)


def _mixture_feeds(mixture: Mixture, width: int) -> Iterator[Feed]:
    maps = {name: weight for name, weight in mixture.rest.items() if weight.ndim > 1}
    yield experts_of(mixture, width, vectors=0 if maps else numel(mixture.rest))
    if maps:
        yield dense_of("a network beside the experts", mixture.rest, width)


def _own_feeds(moe: Any, weights: Weights, width: int) -> list[Feed]:
    """What ``sparsify`` put in: experts in the zoo's form if that gives the layer's own counts, its counts if not."""
    if isinstance(moe, MoELayer):
        top_k = cast(Router, moe.router).experts_per_token
        parts = {
            part: {name: one for name, one in weights.items() if name.startswith(f"{part}.")}
            for part in ("router", "experts", "shared")
        }
        known = {name for held in parts.values() for name in held}
        mixture = Mixture(
            spec=RouterSpec(num_experts=moe.num_experts, top_k=max(1, round(top_k))),
            routers=parts["router"],
            selection_bias=None,
            experts=parts["experts"],
            shared=parts["shared"],
            rest={name: one for name, one in weights.items() if name not in known},
        )
        feeds = list(_mixture_feeds(mixture, width))
        found = [
            layer_params(Layer(mixers=(), feeds=tuple(feeds), norms=0), width=width, norm=0, active=active).total
            for active in (False, True)
        ]
        alike = all(feed.hidden for feed in feeds if isinstance(feed, Experts))
        if alike and found == [numel(weights), moe.num_active_params]:
            return feeds
    active, products = moe.num_active_params, in_products(weights)
    # How many of the active weights multiply is not known: as large a share as of all.
    multiply = products * active // max(1, numel(weights))
    return [Other(name=type(moe).__name__, params=numel(weights), active_params=active, matmul_params=multiply)]


def experts_of(mixture: Mixture, width: int, *, vectors: int = 0) -> Experts:
    """A mixture's experts, router and shared experts, with every weight counted in one of the three.

    Args:
        mixture: its weights.
        width: D of the model.
        vectors: weights that the block adds for all experts together.
    """
    spec = mixture.spec
    # Experts that give the token back, or skip, have no weights.
    num_experts = spec.num_experts - spec.null_experts
    in_experts, routers = numel(mixture.experts), numel(mixture.routers)
    one, over = divmod(in_experts, num_experts)
    hidden, gated, inner, bias = _expert_form(mixture.experts, num_experts, width)
    maps = network_params(inner, hidden, gated=gated, bias=bias)
    shared_hidden, shared_gate, shared_extra = _shared_form(mixture.shared, width, gated=gated, bias=bias)
    selection = mixture.selection_bias is not None and mixture.selection_bias.numel() == num_experts
    linear = num_experts * width <= routers
    left = routers - num_experts * width * linear
    router_bias = left == num_experts
    if mixture.selection_bias is not None and not selection:
        left += mixture.selection_bias.numel()
    limit = spec.groups
    return Experts(
        num_experts=num_experts,
        top_k=min(spec.top_k, num_experts),
        hidden=hidden,
        gated=gated,
        bias=bias,
        width=None if inner == width else inner,
        expert_extra=one - maps,
        shared_hidden=shared_hidden,
        shared_gate=shared_gate,
        # A remainder is of something that experts share.
        shared_extra=shared_extra + over + vectors,
        router_maps=int(linear),
        router_bias=router_bias,
        router_extra=0 if router_bias else left,
        selection_bias=selection,
        groups=1 if limit is None else limit.num_groups,
        groups_kept=1 if limit is None else limit.groups_kept,
    )


def _expert_form(weights: Weights, num_experts: int, width: int) -> tuple[int, bool, int, bool]:
    """Width inside an expert, whether it has three maps, the width that it reads, and whether its maps have biases."""
    # Rows that transformers makes for experts without weights of their own (LongCat) are no part of the form.
    each = {name: weight[0] if weight.ndim == 3 else weight for name, weight in weights.items()}
    stacked = all(weight.ndim == 3 for weight in weights.values())
    products = sum(one.numel() for one in each.values()) if stacked else in_products(weights) // num_experts
    all_ = products if stacked else numel(weights) // num_experts
    # Biases of stacked experts have two dimensions, those of experts of their own one.
    sizes = _sizes(weights.values(), num_experts)
    for inner in (width, *sizes):
        for gated in (True, False):
            for hidden in sizes:
                for bias in (False, True):
                    if network_params(inner, hidden, gated=gated, bias=bias) == all_:
                        return hidden, gated, inner, bias
        for gated in (True, False):
            for hidden in sizes:
                if network_params(inner, hidden, gated=gated, bias=False) == products:
                    return hidden, gated, inner, False
    return 0, False, width, False


def _shared_form(weights: Weights, width: int, *, gated: bool, bias: bool) -> tuple[int, bool, int]:
    """Width inside the shared experts, whether a gate weighs them, and weights beside that."""
    total = numel(weights)
    gate = any(weight.shape == (1, width) for weight in weights.values())
    maps = total - width * gate
    one = network_params(width, 1, gated=gated, bias=bias) - (width if bias else 0)
    hidden = (maps - (width if bias and maps else 0)) // one
    counted = network_params(width, hidden, gated=gated, bias=bias) if hidden else 0
    return hidden, gate, maps - counted


def mixer_of(module: nn.Module, weights: Weights, width: int, routed: RouterSpec | None) -> Mixer:
    """What mixes positions, in a form of the zoo's if the weights are exactly that form's."""
    for form in _forms(module, weights, width):
        if mixer_params(form, width) == numel(weights):
            return form
    return _other(type(module).__name__, weights, routed)


def _other(name: str, weights: Weights, routed: RouterSpec | None = None) -> Other:
    total, products = numel(weights), in_products(weights)
    idle = 0
    if routed is not None:
        stacked = sum(weight.numel() for weight in weights.values() if weight.ndim == 3)
        idle = stacked - stacked * routed.top_k // routed.num_experts
    return Other(name=name, params=total, active_params=total - idle, matmul_params=products - idle)


def _forms(module: nn.Module, weights: Weights, width: int) -> Iterator[Mixer]:
    short = {name.split(".")[-2] if "." in name else name: weight for name, weight in weights.items()}
    # The module, or the one in it that holds the weights: T5's stands one deeper.
    named = ("head_dim", "key_value_proj_dim")
    found: Any = next((part for part in module.modules() if any(hasattr(part, name) for name in named)), module)
    if "kv_b_proj" in short and "kv_a_proj_with_mqa" in short:
        yield from _latent_forms(module, short)
    if "x_proj" in short and "dt_proj" in short:
        mixer: Any = module
        inner, state, rank = mixer.intermediate_size, mixer.ssm_state_size, mixer.time_step_rank
        for norms in (True, False):
            yield Mamba(inner=inner, state=state, conv=mixer.conv_kernel_size, dt_rank=rank, norms=norms)
    head_dim = getattr(found, "head_dim", None) or getattr(found, "key_value_proj_dim", None)
    queries, keys = _head_widths(short, width)
    if head_dim is None or not queries:
        return
    heads, kv_heads = queries // head_dim, keys // head_dim
    if "output_gate" in short:
        yield LinearAttention(heads=heads, head_dim=head_dim, block=getattr(module, "block_size", 256))
    cross = any(re.search("EncDec|cross|encoder_attn", name) for name in weights)
    # A gate of the output has a map of its own, or its rows stand among those of the queries.
    for gated, asked in ((False, heads), (True, heads), (True, heads // 2)):
        for form in _attention_forms(found, asked, kv_heads, head_dim):
            yield replace(form, gated=gated, cross=cross)


def _head_widths(short: Weights, width: int) -> tuple[int, int]:
    """Channels of all query heads and of all key heads."""
    if "q_proj" in short and "k_proj" in short:
        return short["q_proj"].shape[0], short["k_proj"].shape[0]
    if "q" in short and "k" in short:
        return short["q"].shape[0], short["k"].shape[0]
    if "out_proj" in short:
        joint = short.get("Wqkv", short.get("qkv_proj"))
        if joint is not None:
            queries = short["out_proj"].shape[1]
            return queries, (joint.shape[0] - queries) // 2
    return 0, 0


def _attention_forms(module: Any, heads: int, kv_heads: int, head_dim: int) -> Iterable[Attention]:
    window = getattr(module, "sliding_window", None)
    buckets = module.relative_attention_num_buckets if getattr(module, "has_relative_attention_bias", False) else 0
    for qk_norm in ("none", "head", "full"):
        for qkv_bias, out_bias in ((False, False), (True, False), (True, True)):
            for sinks in (False, True):
                yield Attention(
                    heads=heads,
                    kv_heads=kv_heads,
                    head_dim=head_dim,
                    qkv_bias=qkv_bias,
                    out_bias=out_bias,
                    qk_norm=qk_norm,
                    sinks=sinks,
                    window=window if isinstance(window, int) else None,
                    buckets=buckets,
                )


def _latent_forms(module: Any, short: Weights) -> Iterable[LatentAttention]:
    nope, value = module.qk_nope_head_dim, module.v_head_dim
    yield LatentAttention(
        heads=short["kv_b_proj"].shape[0] // (nope + value),
        q_rank=short["q_a_proj"].shape[0] if "q_a_proj" in short else None,
        kv_rank=short["kv_b_proj"].shape[1],
        nope_dim=nope,
        rope_dim=module.qk_rope_head_dim,
        value_dim=value,
    )


def _sizes(weights: Iterable[Tensor], share: int = 1) -> list[int]:
    """Numbers that a hidden width may be: dimensions, halves of them, and shares where experts are joined."""
    found: set[int] = set()
    for weight in weights:
        for size in weight.shape:
            found |= {size // part for part in (1, 2, share, 2 * share) if size % part == 0}
    return sorted(found - {0}, reverse=True)
