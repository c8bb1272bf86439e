"""Counting: rows of each expert, by layer and by domain, and cutting a trace into the parts to compare.

Counts come from the router's own choices. Every choice counts, not only the first; a row that capacity dropped later
counts too, since the router did choose it. Arrays over layers have room for the widest layer; entries of experts that a
narrower layer lacks are NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.core.errors import ConfigError
from moesaic.lens.measures.measured import FloatArray, IntArray
from moesaic.telemetry.trace import RoutingTrace

NO_DOMAIN = "no domain given"
"""What rows of unknown domain are called."""


def domains(trace: RoutingTrace) -> tuple[str, ...]:
    """The names of the domains that have rows, in the metadata's order, and ``NO_DOMAIN`` last if some have none."""
    return tuple(NO_DOMAIN if index < 0 else trace.metadata.domains[index] for index in _present(trace))


def exists_LE(trace: RoutingTrace) -> npt.NDArray[np.bool_]:
    """True where a layer has such an expert."""
    num_experts_L = np.asarray(trace.metadata.num_experts)
    mask_LE: npt.NDArray[np.bool_] = np.arange(num_experts_L.max()) < num_experts_L[:, None]
    return mask_LE


def load(trace: RoutingTrace) -> FloatArray:
    """Rows that each expert was given: ``load[l, e] = #{rows of layer l that chose e}``, shape (L, E)."""
    exists = exists_LE(trace)
    return np.where(exists, _count(trace, trace.layer, len(exists)), np.nan)


def load_by_domain(trace: RoutingTrace) -> FloatArray:
    """``load`` of each domain by itself, in the order of ``domains``, shape (L, Q, E)."""
    exists = exists_LE(trace)
    present = _present(trace)
    # Place -1 of this table is what rows of unknown domain look up.
    index_Q = np.zeros(len(trace.metadata.domains) + 1, dtype=np.int64)
    index_Q[present] = np.arange(len(present))
    cell_N = trace.layer.astype(np.int64) * len(present) + index_Q[trace.domain]
    load_LQE = _count(trace, cell_N, len(exists) * len(present)).reshape(len(exists), len(present), exists.shape[1])
    return np.where(exists[:, None], load_LQE, np.nan)


def rows_L(trace: RoutingTrace) -> IntArray:
    """Rows of each layer: choices of all its tokens."""
    return np.bincount(trace.layer, minlength=trace.num_layers)


def by_domain(trace: RoutingTrace) -> dict[str, RoutingTrace]:
    """The rows of each domain as a trace of their own, so that any measure of a part is that measure by domain."""
    return {
        name: trace.where(trace.domain == index) for name, index in zip(domains(trace), _present(trace), strict=True)
    }


def by_position(trace: RoutingTrace, num_bins: int = 8) -> dict[str, RoutingTrace]:
    """The rows of each stretch of positions as a trace of their own; equal stretches, named ``0–31``, ``32–63`` …

    Args:
        num_bins: stretches, at most; fewer where the longest sequence has fewer tokens.
    Raises:
        ConfigError: if ``num_bins`` is less than 1.
    """
    if num_bins < 1:
        raise ConfigError(f"num_bins must be at least 1, got {num_bins}. Ask for one stretch of positions or more.")
    length = int(trace.position.max(initial=-1)) + 1
    edges = np.unique(np.linspace(0, length, num_bins + 1).round().astype(np.int64))
    return {
        f"{first}–{end - 1}": trace.where((trace.position >= first) & (trace.position < end))
        for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    }


def _present(trace: RoutingTrace) -> list[int]:
    """Indices of the domains that have rows; -1, for none, last."""
    rows_Q = np.bincount(trace.domain.astype(np.int64) + 1, minlength=1)
    present: list[int] = (np.flatnonzero(rows_Q[1:])).tolist()
    return [*present, -1] if rows_Q[0] else present


def _count(trace: RoutingTrace, cell_N: npt.NDArray[Any], num_cells: int) -> IntArray:
    """How often each (cell, expert) occurs."""
    num_experts = max(trace.metadata.num_experts)
    # In place, since each copy of ten million rows is 80 MB.
    flat_N = cell_N.astype(np.int64)
    flat_N *= num_experts
    flat_N += trace.expert
    return np.bincount(flat_N, minlength=num_cells * num_experts).reshape(num_cells, num_experts)
