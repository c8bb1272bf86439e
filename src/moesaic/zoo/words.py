"""A shape in words: what its layers are, row by row."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import assert_never

from moesaic.zoo.layers import (
    Attention,
    Dense,
    Experts,
    Feed,
    LatentAttention,
    Layer,
    LinearAttention,
    Lstm,
    Mamba,
    Mixer,
    Other,
)
from moesaic.zoo.published import number
from moesaic.zoo.shape import ModelShape


def placement(layers: tuple[Layer, ...]) -> list[tuple[str, Layer]]:
    """The different layers of a stack, each with the places where it stands.

    Args:
        layers: of the stack, first to last.
    Returns:
        Places such as "0-2" or "1, 3, ..., 31", and the layer.
    """
    kinds = dict.fromkeys(layers)
    return [(_places([index for index, layer in enumerate(layers) if layer == kind]), kind) for kind in kinds]


def _places(indices: list[int]) -> str:
    """Consecutive numbers as a range, evenly spaced ones with dots."""
    steps = {after - before for before, after in pairwise(indices)}
    if len(indices) == 1:
        return str(indices[0])
    if steps == {1}:
        return f"{indices[0]}-{indices[-1]}"
    if len(indices) > 3 and len(steps) == 1:
        return f"{indices[0]}, {indices[1]}, ..., {indices[-1]}"
    runs = [[index for _, index in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    if len(runs) > 6:
        return f"{indices[0]}, {indices[1]}, {indices[2]}, ..., {indices[-1]} ({len(indices)})"
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def mixer_words(mixer: Mixer) -> str:
    """One mixer of positions in a line."""
    match mixer:
        case Attention():
            return _attention_words(mixer)
        case LatentAttention():
            rank = "straight" if mixer.q_rank is None else f"through {mixer.q_rank}"
            keys = f"{mixer.nope_dim}+{mixer.rope_dim}"
            return f"latent attention, {mixer.heads} heads x {keys}, latent {mixer.kv_rank}, queries {rank}"
        case LinearAttention():
            return f"lightning attention, {mixer.heads} heads x {mixer.head_dim}"
        case Mamba():
            return f"Mamba, {mixer.inner} channels x {mixer.state} states"
        case Lstm():
            given = f", projected to {mixer.projection}" if mixer.projection else ""
            return f"LSTM, {mixer.hidden} cells{given}"
        case Other():
            return f"{mixer.name}, {mixer.params:,} weights"
    assert_never(mixer)


def _attention_words(mixer: Attention) -> str:
    groups = "" if mixer.kv_heads == mixer.heads else f", {mixer.kv_heads} key-value heads"
    extras = [
        "biases" if mixer.qkv_bias else "",
        "norms on queries and keys" if mixer.qk_norm != "none" else "",
        "a gate" if mixer.gated else "",
        "sinks" if mixer.sinks else "",
        f"window {mixer.window}" if mixer.window else "",
        f"{mixer.buckets} relative positions" if mixer.buckets else "",
    ]
    kind = "attention to the encoder" if mixer.cross else "attention"
    return ", ".join([f"{kind}, {mixer.heads} heads x {mixer.head_dim}{groups}", *filter(None, extras)])


def feed_words(feed: Feed) -> str:
    """One feed-forward part of a layer in a line."""
    match feed:
        case Dense():
            return f"dense, {feed.hidden} wide" + ("" if feed.gated else ", two maps")
        case Experts():
            shared = f", shared {feed.shared_hidden} wide" if feed.shared_hidden else ""
            limit = f", from {feed.groups_kept} of {feed.groups} groups" if feed.groups > 1 else ""
            maps = "" if feed.gated else ", two maps"
            return f"{feed.top_k} of {feed.num_experts} experts, {feed.hidden} wide{maps}{limit}{shared}"
        case Other():
            return f"{feed.name}, {feed.params:,} weights"
    assert_never(feed)


def choice_words(shape: ModelShape) -> str:
    """How many experts of how many, over all layers that have some, such as "2/8" or "1/32-64"."""
    mixtures = shape.mixtures
    if not mixtures:
        return "dense"
    chosen = sorted({one.top_k for one in mixtures})
    counts = sorted({one.num_experts for one in mixtures})
    return "/".join("-".join(str(one) for one in dict.fromkeys((few[0], few[-1]))) for few in (chosen, counts))


def short(count: float) -> str:
    """A count with four digits and a unit, such as "46.70B"."""
    for scale, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= scale:
            return f"{count / scale:.4g}{unit}" if count < 1000 * scale else f"{count / scale:,.0f}{unit}"
    return f"{count:.0f}"


def difference(shape: ModelShape, *, active: bool = False) -> float | None:
    """How far the count is from the published figure, relative to it, counting what it counts; None without one.

    Args:
        shape: of the model.
        active: compare weights that work on one token.
    """
    published = shape.published
    printed = "" if published is None else published.active if active else published.total
    if published is None or not printed:
        return None
    left_out = published.active_without if active else published.total_without
    return shape.num_params_without(left_out, active=active) / number(printed) - 1
