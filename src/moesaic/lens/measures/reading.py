"""One layer of a trace as people read it: a line for each token, in the order of the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.lens.measures.measured import IntArray
from moesaic.telemetry.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """What one layer did with each of its tokens, sorted by sequence and position.

    Attributes:
        place_T: sequence and position in one number, ``sequence << 32 | position``, rising.
        token_T: the token ids; -1 where the model reads none.
        domain_T: index of each token's domain, or -1.
        expert_TK: each token's experts, best first; -1 behind the last one of a token that has fewer than others.
        num_experts: experts of the layer.
    """

    place_T: IntArray
    token_T: IntArray
    domain_T: IntArray
    expert_TK: IntArray
    num_experts: int

    @property
    def num_tokens(self) -> int:
        """Tokens that have an expert in this layer."""
        return len(self.place_T)

    @property
    def sequence_T(self) -> IntArray:
        """Each token's piece of text."""
        return self.place_T >> 32

    def take(self, index: npt.NDArray[Any]) -> Reading:
        """The tokens at ``index`` (places or a mask), in that order."""
        return Reading(
            place_T=self.place_T[index],
            token_T=self.token_T[index],
            domain_T=self.domain_T[index],
            expert_TK=self.expert_TK[index],
            num_experts=self.num_experts,
        )


def reading(trace: RoutingTrace, layer: int) -> Reading:
    """Lay one layer's rows out by token; rows may stand in any order in the trace."""
    rows = np.flatnonzero(trace.layer == layer)
    place_N, choice_N = _place(trace, rows), trace.choice[rows]
    if not _in_order(place_N, choice_N):
        order = np.lexsort((choice_N, place_N))
        rows, place_N = rows[order], place_N[order]
    starts = np.flatnonzero(np.diff(place_N, prepend=-1))
    count_T = np.diff(starts, append=len(rows))
    slot_N = np.arange(len(rows)) - np.repeat(starts, count_T)
    expert_TK = np.full((len(starts), int(count_T.max(initial=1))), -1, dtype=np.int64)
    expert_TK[np.repeat(np.arange(len(starts)), count_T), slot_N] = trace.expert[rows]
    first = rows[starts]
    return Reading(
        place_T=place_N[starts],
        token_T=trace.token_id[first].astype(np.int64),
        domain_T=trace.domain[first].astype(np.int64),
        expert_TK=expert_TK,
        num_experts=trace.metadata.num_experts[layer],
    )


def readings(trace: RoutingTrace) -> Iterator[Reading]:
    """Every layer's reading in depth order, made one at a time, so that only one is held."""
    for layer in range(trace.num_layers):
        yield reading(trace, layer)


def num_tokens_L(trace: RoutingTrace) -> IntArray:
    """Tokens that have an expert, in each layer."""
    found = []
    for layer in range(trace.num_layers):
        place_N = _place(trace, np.flatnonzero(trace.layer == layer))
        # A token's rows mostly stand together: what is left after that is far less to sort.
        place_N = place_N[np.flatnonzero(np.diff(place_N, prepend=-1))]
        found.append(len(place_N) if (np.diff(place_N) > 0).all() else len(np.unique(place_N)))
    return np.asarray(found, dtype=np.int64)


def _place(trace: RoutingTrace, rows: npt.NDArray[Any]) -> IntArray:
    place_N: IntArray = trace.sequence[rows].astype(np.int64) << 32 | trace.position[rows].astype(np.int64)
    return place_N


def _in_order(place_N: IntArray, choice_N: npt.NDArray[Any]) -> bool:
    step_N = np.diff(place_N)
    return bool(((step_N > 0) | ((step_N == 0) & (np.diff(choice_N) > 0))).all())
