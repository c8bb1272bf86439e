"""What a routing trace says, as numbers: pure functions of its columns, each with its formula.

Counts come from the router's own choices. Every choice counts, not only the first; a row that capacity dropped later
counts too, since the router did choose it. Experts that got nothing count in every mean.

Arrays over layers have room for the largest layer; entries of experts that a smaller layer lacks are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.telemetry.trace import RoutingTrace

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NO_DOMAIN = "no domain given"
"""What rows of unknown domain are called."""


def domains(trace: RoutingTrace) -> tuple[str, ...]:
    """The names of the domains that have rows, in the metadata's order, and ``NO_DOMAIN`` last if some have none."""
    present = np.unique(trace.domain)
    named = tuple(trace.metadata.domains[index] for index in present if index >= 0)
    return (*named, NO_DOMAIN) if -1 in present else named


def exists_LE(trace: RoutingTrace) -> npt.NDArray[np.bool_]:
    """True where a layer has such an expert."""
    num_experts_L = np.asarray(trace.metadata.num_experts)
    mask_LE: npt.NDArray[np.bool_] = np.arange(num_experts_L.max()) < num_experts_L[:, None]
    return mask_LE


def load(trace: RoutingTrace) -> FloatArray:
    """Rows that each expert was given: ``load[l, e] = #{rows of layer l that chose e}``, shape (L, E)."""
    exists = exists_LE(trace)
    num_layers, num_experts = exists.shape
    flat = trace.layer.astype(np.int64) * num_experts + trace.expert
    load_LE = np.bincount(flat, minlength=exists.size).reshape(num_layers, num_experts)
    return np.where(exists, load_LE, np.nan)


def load_by_domain(trace: RoutingTrace) -> FloatArray:
    """``load`` of each domain by itself, in the order of ``domains``, shape (L, Q, E)."""
    exists = exists_LE(trace)
    num_layers, num_experts = exists.shape
    present, index_N = np.unique(trace.domain, return_inverse=True)
    if len(present) and present[0] == -1:
        # np.unique puts -1 first, the reader wants it last.
        index_N = (index_N - 1) % len(present)
    flat = (trace.layer.astype(np.int64) * len(present) + index_N) * num_experts + trace.expert
    shape = (num_layers, len(present), num_experts)
    load_LQE = np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)
    return np.where(exists[:, None], load_LQE, np.nan)


def share(trace: RoutingTrace) -> FloatArray:
    """How a domain's choices split over the experts, shape (L, Q, E).

    ``share[l, q, e] = load[l, q, e] / sum_e' load[l, q, e']``: over all choices, so that a uniform router gives
    ``1 / E`` whatever its top-k (Jiang et al. 2024, arXiv:2401.04088, section 5). NaN where a domain has no rows.
    """
    return _normalised(load_by_domain(trace))


def load_share(trace: RoutingTrace) -> FloatArray:
    """``load`` divided by its sum in each layer, shape (L, E); a uniform router gives ``1 / E``."""
    return _normalised(load(trace))


def max_over_mean(trace: RoutingTrace) -> FloatArray:
    """``max_e load[l, e] / (sum_e load[l, e] / E)`` of each layer, shape (L,): 1 is perfect balance, E the worst.

    The mean is over all E experts, those without a single row too: leaving them out would hide the worst imbalance.
    """
    load_LE = load(trace)
    mean_L = np.nansum(load_LE, axis=1) / np.asarray(trace.metadata.num_experts)
    largest_L = np.nanmax(load_LE, axis=1)
    return _divide(largest_L, mean_L)


def idle_experts(trace: RoutingTrace) -> list[tuple[int, int]]:
    """(layer, expert) of every expert that got no row in this trace."""
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(load(trace) == 0)]


def drop_rate(trace: RoutingTrace) -> FloatArray:
    """``#{rows dropped by capacity} / #{rows}`` of each layer, shape (L,); NaN where a layer has no rows."""
    rows_L = np.bincount(trace.layer, minlength=trace.num_layers)
    dropped_L = np.bincount(trace.layer[~trace.kept], minlength=trace.num_layers)
    return _divide(dropped_L, rows_L)


def experts_per_token(trace: RoutingTrace) -> FloatArray:
    """``#{rows of layer l} / #{tokens of layer l}``, shape (L,): top-k, or its average where it differs by token.

    Tokens that no expert of the layer took have no row there and are not counted.
    """
    rows_L = np.bincount(trace.layer, minlength=trace.num_layers)
    place_N = trace.sequence.astype(np.int64) << 32 | trace.position.astype(np.int64)
    tokens = [len(np.unique(place_N[trace.layer == layer])) for layer in range(trace.num_layers)]
    return _divide(rows_L, np.asarray(tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class Taker:
    """The expert that takes more of a domain than of the average one, and both shares."""

    layer: int
    domain: str
    expert: int
    share: float
    average: float


def takers(trace: RoutingTrace, layer: int) -> list[Taker]:
    """For each domain the expert with the largest ``share[l, q, e] - mean_q' share[l, q', e]`` in this layer.

    The difference and not the ratio, so that an expert that hardly works at all cannot win.
    """
    share_QE = share(trace)[layer]
    average_E = _mean_over_domains(share_QE[None])[0]
    found = []
    for index, name in enumerate(domains(trace)):
        if name == NO_DOMAIN or np.isnan(share_QE[index]).all():
            continue
        expert = int(np.nanargmax(share_QE[index] - average_E))
        found.append(
            Taker(
                layer=layer,
                domain=name,
                expert=expert,
                share=float(share_QE[index, expert]),
                average=float(average_E[expert]),
            )
        )
    return found


def repetition(trace: RoutingTrace) -> tuple[FloatArray, FloatArray]:
    """How often a token's best expert is the one of the token before it: (observed, chance), each of shape (L,).

    Observed: ``#{i: e_i = e_(i+1)} / #{neighbours i, i+1 of one sequence}`` over first choices (Jiang et al. 2024,
    section 5). Chance: ``sum_e p_e^2`` with ``p`` the layer's own shares of first choices, which is ``1 / E`` when they
    are even and more when they are not.
    """
    observed_L, chance_L = np.full((2, trace.num_layers), np.nan)
    for layer in range(trace.num_layers):
        rows = np.flatnonzero((trace.layer == layer) & (trace.choice == 0))
        rows = rows[np.lexsort((trace.position[rows], trace.sequence[rows]))]
        expert = trace.expert[rows]
        neighbours = (np.diff(trace.sequence[rows]) == 0) & (np.diff(trace.position[rows]) == 1)
        if neighbours.any():
            observed_L[layer] = (expert[1:] == expert[:-1])[neighbours].mean()
            chance_L[layer] = np.square(np.bincount(expert) / len(expert)).sum()
    return observed_L, chance_L


def _normalised(load: FloatArray) -> FloatArray:
    return _divide(load, np.nansum(load, axis=-1, keepdims=True))


def _mean_over_domains(share_LQE: FloatArray) -> FloatArray:
    known_LQE = ~np.isnan(share_LQE)
    count_LE = known_LQE.sum(axis=1)
    total_LE = np.where(known_LQE, share_LQE, 0).sum(axis=1)
    return _divide(total_LE, count_LE)


def _divide(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> FloatArray:
    """``part / whole``, and NaN where there is no whole."""
    ratio: FloatArray = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return ratio
