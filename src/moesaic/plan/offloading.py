"""Experts that do not fit: how often the one that is needed is there, by several rules, and what a token then takes."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from moesaic.core.errors import ConfigError
from moesaic.plan.devices import Device
from moesaic.plan.memory import expert_bytes
from moesaic.plan.popularity import Ints, Popularity, Recorded
from moesaic.zoo import Experts, ModelShape, cost

TOKENS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class HitRates:
    """Share of needed experts that are in fast memory.

    Attributes:
        slots: experts of a layer that fit.
        lru: the expert used longest ago makes room.
        static: those used most often over all tokens stay once they came, and the others are fetched each time.
        best: of those there and the one that came, the expert whose next use is farthest goes (Belady): no rule that
            fetches on demand does better.
    """

    slots: int
    lru: float
    static: float
    best: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """A model with its experts in the host's memory and some of them in the device's.

    Attributes:
        fast_bytes: of the device.
        pinned: bytes that are always there: all weights but routed experts, and the cache of one sequence.
        slots: experts of each layer that fit in the rest, the same in all, beside room for those at work.
        rates: averaged over layers.
        seconds: per output token of one sequence at best, by rule: fast memory read, then what is missing fetched.
        tokens: of routing that the rates are counted over.
        routing: in words.
    """

    fast_bytes: float
    pinned: float
    slots: int
    rates: HitRates
    seconds: dict[str, float]
    tokens: int
    routing: str


def offload(
    shape: ModelShape,
    device: Device,
    popularity: Popularity,
    *,
    fast_bytes: float,
    context: int,
    dtype: str = "bf16",
    cache_dtype: str = "bf16",
    tokens: int = TOKENS,
    seed: int = 0,
) -> Offload:
    """Plan one sequence on one device whose memory does not hold all experts.

    Args:
        shape: of the model.
        device: that fetches experts from the host.
        popularity: of experts; recorded choices are taken in their order, others are drawn.
        fast_bytes: of the device's memory.
        context: tokens in the cache.
        dtype: of weights.
        cache_dtype: of the cache.
        tokens: of routing to count over, at most.
        seed: of the draws.
    Raises:
        ConfigError: if the model has no experts, the device no link to a host, or what is always needed does not fit.
    """
    if not shape.mixtures:
        raise ConfigError(f"A model with experts was needed, got {shape.name} without any. Nothing can be offloaded.")
    if not device.link_host:
        raise ConfigError(f"{device.name} has no link to a host's memory in the table. Choose a device that has one.")
    parts = shape.params()
    pinned = (parts.total - parts.experts) * cost.bits(dtype) / 8 + shape.cache_bytes(context, dtype=cache_dtype)
    sizes = [expert_bytes(experts, shape.width, dtype) for experts in shape.mixtures]
    # Room for the experts of one token in one layer, which are there while they work, in the cache or not.
    staging = max(size * experts.top_k for size, experts in zip(sizes, shape.mixtures, strict=True))
    if pinned + staging > fast_bytes:
        raise ConfigError(
            f"{shape.name} needs {(pinned + staging) / 1e9:.1f} GB of fast memory for what is always read and the "
            f"experts of one token in one layer, got {fast_bytes / 1e9:.1f} GB. Use a smaller dtype or context, or a "
            "larger device."
        )
    slots = int((fast_bytes - pinned - staging) // sum(sizes))
    streams = [_stream(popularity, layer, experts, tokens, seed) for layer, experts in enumerate(shape.mixtures)]
    rates = [
        hit_rates(stream, min(slots, experts.num_experts))
        for stream, experts in zip(streams, shape.mixtures, strict=True)
    ]
    # What one token's experts weigh, and what of it has to be fetched, over all layers.
    used = [size * float((stream >= 0).sum()) / len(stream) for size, stream in zip(sizes, streams, strict=True)]
    mean = HitRates(slots=min(slots, max(one.num_experts for one in shape.mixtures)), **_mean(rates))
    # The input table is looked up, a row a token.
    read = (pinned - (0 if shape.tied else parts.embeddings * cost.bits(dtype) / 8) + sum(used)) / device.bandwidth
    return Offload(
        fast_bytes=fast_bytes,
        pinned=pinned,
        slots=mean.slots,
        rates=mean,
        seconds={rule: read + _missing(used, rates, rule) / device.link_host for rule in ("lru", "static", "best")},
        tokens=len(streams[0]),
        routing=popularity.name,
    )


def _mean(rates: Sequence[HitRates]) -> dict[str, float]:
    return {name: float(np.mean([getattr(one, name) for one in rates])) for name in ("lru", "static", "best")}


def _missing(used: Sequence[float], rates: Sequence[HitRates], rule: str) -> float:
    return float(sum(size * (1 - getattr(one, rule)) for size, one in zip(used, rates, strict=True)))


def _stream(popularity: Popularity, layer: int, experts: Experts, tokens: int, seed: int) -> Ints:
    if isinstance(popularity, Recorded):
        popularity.check(layer, experts)
        return np.asarray(popularity.choices_LTK[layer][:tokens])
    return popularity.choices_TK(layer, experts, tokens, seed)


def hit_rates(choices_TK: Ints, slots: int) -> HitRates:
    """Count hits when one layer's choices come token by token, choice by choice; the cache is empty at first.

    Args:
        choices_TK: experts of each token in order; -1 for no choice.
        slots: experts that fit; 0 for none.
    Raises:
        ConfigError: if slots are negative.
    """
    if slots < 0:
        raise ConfigError(f"slots must be at least 0, got {slots}. Give the experts that fit.")
    asked = [int(expert) for expert in choices_TK.ravel() if expert >= 0]
    if not asked:
        return HitRates(slots=slots, lru=0.0, static=0.0, best=0.0)
    kept = sum(times - 1 for _, times in Counter(asked).most_common(slots))
    return HitRates(
        slots=slots,
        lru=_lru(asked, slots) / len(asked),
        static=kept / len(asked),
        best=_belady(asked, slots) / len(asked),
    )


def _lru(asked: Sequence[int], slots: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in asked:
        if expert in held:
            hits += 1
            held.move_to_end(expert)
            continue
        if slots:
            if len(held) == slots:
                held.popitem(last=False)
            held[expert] = None
    return hits


def _belady(asked: Sequence[int], slots: int) -> int:
    never = len(asked)
    following = [never] * len(asked)
    last: dict[int, int] = {}
    for place in range(len(asked) - 1, -1, -1):
        following[place] = last.get(asked[place], never)
        last[asked[place]] = place
    held: dict[int, int] = {}
    # Farthest next use first; entries that a later use has overtaken are passed over.
    queue: list[tuple[int, int]] = []
    hits = 0
    for place, expert in enumerate(asked):
        hits += expert in held
        held[expert] = following[place]
        heappush(queue, (-following[place], expert))
        while len(held) > slots:
            # What was fetched just now may be the one that does not stay.
            farthest, gone = heappop(queue)
            if held.get(gone) == -farthest:
                del held[gone]
    return hits
