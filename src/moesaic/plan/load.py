"""What a distribution of choices means for devices: how uneven their rows, what a capacity drops, how far tokens go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moesaic.core.errors import ConfigError
from moesaic.plan.popularity import SAMPLE, Floats, Popularity, Recorded
from moesaic.zoo import Experts

DRAWS = 400


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Loads:
    """Rows that reach each device, as multiples of the mean, in many draws of a micro-batch.

    Attributes:
        factors: draws, mixtures, and the devices that share their experts, a group of experts each.
    """

    factors: Floats

    def busiest(self) -> float:
        """Rows of the busiest device of a layer, on average over draws and layers: all others wait for it."""
        return _busiest(self)

    def p99(self, start: int, stop: int) -> float:
        """Rows that a device has over these mixtures together: what the fullest one exceeds in 1 of 100 draws."""
        return _p99(self, start, stop)


@lru_cache(maxsize=128)
def _busiest(drawn: Loads) -> float:
    return float(drawn.factors.max(axis=2).mean()) if drawn.factors.size else 1.0


@lru_cache(maxsize=1024)
def _p99(drawn: Loads, start: int, stop: int) -> float:
    part = drawn.factors[:, start:stop]
    return float(np.quantile(part.mean(axis=1).max(axis=1), 0.99)) if part.size else 1.0


@lru_cache(maxsize=128)
def loads(popularity: Popularity, mixtures: tuple[Experts, ...], *, ep: int, tokens: int, seed: int = 0) -> Loads:
    """Draw loads of the ``ep`` devices that share the experts of each layer, experts dealt out in order.

    Of independent tokens, a device's rows are close to normal; they are drawn so, given that they add up. Of a recorded
    routing, whole sequences are drawn with replacement until there are tokens enough.

    Args:
        popularity: of experts.
        mixtures: of all layers that have one, in order.
        ep: devices.
        tokens: of a micro-batch, over all these devices.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    if not mixtures:
        return Loads(factors=np.ones((DRAWS, 0, ep)))
    if isinstance(popularity, Recorded):
        return Loads(factors=_resampled(popularity, mixtures, ep, tokens, rng))
    found = np.empty((DRAWS, len(mixtures), ep))
    for layer, experts in enumerate(mixtures):
        chances_GE = popularity.chances_E(layer, experts).reshape(ep, -1)
        mean_G = tokens * chances_GE.sum(axis=1)
        # Of experts apart: that choices exclude each other comes in with the sum below.
        spread_G = tokens * (chances_GE * (1 - chances_GE)).sum(axis=1) * _clumping(popularity, 0, experts, ep)
        drawn = mean_G + np.sqrt(spread_G) * rng.standard_normal((DRAWS, ep))
        total = spread_G.sum()
        if total:
            drawn -= (drawn.sum(axis=1, keepdims=True) - mean_G.sum()) * spread_G / total
        found[:, layer] = np.maximum(drawn, 0.0) / (mean_G.sum() / ep)
    return Loads(factors=found)


@lru_cache(maxsize=256)
def _clumping(popularity: Popularity, layer: int, experts: Experts, ep: int) -> float:
    """How much more a device's rows vary because a token's choices stay in few groups; 1 without groups."""
    if experts.groups == 1 or ep == 1:
        return 1.0
    choices_TK = popularity.choices_TK(0, experts, 4096)
    counts_TG = _per_device(choices_TK, experts.num_experts, ep)
    chances_GE = popularity.chances_E(layer, experts).reshape(ep, -1)
    apart = (chances_GE * (1 - chances_GE)).sum() * (1 - 1 / ep)
    return float(counts_TG.var(axis=0).sum() / apart)


def _per_device(choices_TK: np.ndarray[tuple[int, ...], np.dtype[np.int64]], num_experts: int, ep: int) -> Floats:
    device_TK = np.where(choices_TK >= 0, choices_TK * ep // num_experts, ep)
    counts = np.zeros((len(choices_TK), ep + 1))
    np.add.at(counts, (np.arange(len(choices_TK))[:, None], device_TK), 1.0)
    return counts[:, :ep]


def _resampled(
    popularity: Recorded, mixtures: tuple[Experts, ...], ep: int, tokens: int, rng: np.random.Generator
) -> Floats:
    sequences = int(popularity.sequence_T.max()) + 1
    length_S = np.bincount(popularity.sequence_T, minlength=sequences)
    enough = math.ceil(tokens / length_S.mean())
    picked = rng.integers(sequences, size=(DRAWS, enough))
    times = np.zeros((DRAWS, sequences))
    np.add.at(times, (np.arange(DRAWS)[:, None], picked), 1.0)
    found = np.empty((DRAWS, len(mixtures), ep))
    for layer, experts in enumerate(mixtures):
        popularity.check(layer, experts)
        count_SG = np.zeros((sequences, ep))
        np.add.at(count_SG, popularity.sequence_T, _per_device(popularity.choices_LTK[layer], experts.num_experts, ep))
        rows = times @ count_SG
        # Sequences differ in length: what counts is how rows are shared out.
        found[:, layer] = rows / rows.mean(axis=1, keepdims=True)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """How far one token travels, on average.

    Attributes:
        rows: experts that it passes.
        devices: different devices that have them.
        nodes: different nodes that have them.
    """

    rows: float
    devices: float
    nodes: float


def reach(popularity: Popularity, layer: int, experts: Experts, *, ep: int, per_node: int) -> Reach:
    """Count the devices and nodes that one token's experts are on; exact if experts are all alike and in no groups.

    Args:
        popularity: of experts.
        layer: among those with a mixture.
        experts: of it.
        ep: devices that share them.
        per_node: of these, in one node.
    """
    return _reach(popularity, 0 if popularity.alike else layer, experts, ep, per_node)


@lru_cache(maxsize=1024)
def _reach(popularity: Popularity, layer: int, experts: Experts, ep: int, per_node: int) -> Reach:
    nodes = math.ceil(ep / per_node)
    rows = float(popularity.chances_E(layer, experts).sum())
    if popularity.alike and experts.groups == 1:
        devices = _hit(experts.num_experts, experts.top_k, ep)
        return Reach(rows=rows, devices=devices, nodes=_hit(experts.num_experts, experts.top_k, nodes))
    choices_TK = popularity.choices_TK(layer, experts, SAMPLE)
    counts_TG = _per_device(choices_TK, experts.num_experts, ep)
    by_node = np.add.reduceat(counts_TG, np.arange(0, ep, per_node), axis=1)
    return Reach(
        rows=rows,
        devices=float((counts_TG > 0).sum(axis=1).mean()),
        nodes=float((by_node > 0).sum(axis=1).mean()),
    )


def _hit(num_experts: int, top_k: int, bins: int) -> float:
    """Different bins that ``top_k`` of experts dealt out evenly fall into."""
    outside = num_experts - num_experts / bins
    missed = math.prod((outside - taken) / (num_experts - taken) for taken in range(top_k)) if outside >= top_k else 0.0
    return bins * (1 - missed)


def distinct(popularity: Popularity, layer: int, experts: Experts, tokens: float) -> float:
    """Different experts that so many independent tokens use: the sum over experts of 1 - (1 - chance) ** tokens.

    With experts all alike it is ``E * (1 - (1 - K / E) ** T)``, which is less than ``min(T * K, E)``.
    """
    chances_E = popularity.chances_E(layer, experts)
    return float((1 - (1 - np.minimum(chances_E, 1.0)) ** tokens).sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Drops:
    """What a capacity does to the rows of one layer.

    Attributes:
        capacity: rows that one expert may take.
        rate: share of rows dropped.
        empty: share of places left empty.
    """

    capacity: int
    rate: float
    empty: float


def drops(popularity: Popularity, layer: int, experts: Experts, *, tokens: int, factor: float) -> Drops:
    """Expect the drops at ``capacity = ceil(factor * tokens * K / E)``, exactly for independent tokens.

    An expert's rows are then binomial, and what exceeds its places is the tail's mean.

    Args:
        popularity: of experts.
        layer: among those with a mixture.
        experts: of it.
        tokens: that compete for the same places.
        factor: 1 for places for all if experts got the same.
    Raises:
        ConfigError: if the factor is not positive.
    """
    if factor <= 0:
        raise ConfigError(
            f"capacity factor must be positive, got {factor}. 1.25 is common; leave it out to drop nothing."
        )
    from scipy.stats import binom

    chances_E = np.minimum(popularity.chances_E(layer, experts), 1.0)
    rows = tokens * chances_E.sum()
    # 50 * 1.1 is 55.00000000000001: the last bit must not buy a place.
    capacity = math.ceil(factor * rows / experts.num_experts - 1e-6)
    above = tokens * chances_E * binom.sf(capacity - 1, tokens - 1, chances_E)
    lost = float(np.maximum(above - capacity * binom.sf(capacity, tokens, chances_E), 0.0).sum())
    places = capacity * experts.num_experts
    return Drops(capacity=capacity, rate=float(lost / rows), empty=float(max(0.0, 1 - (rows - lost) / places)))
