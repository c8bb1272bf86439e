"""What an expert's number tells: mutual information, in bits, beside what chance alone would show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.lens.measures.chance import p_value, shifted
from moesaic.lens.measures.measured import IntArray
from moesaic.lens.measures.pairs import first_choices, pairs
from moesaic.lens.measures.reading import reading, readings
from moesaic.telemetry.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True, slots=True)
class Information:
    """How much one layer's choice of expert tells about something, in bits.

    Attributes:
        bits: mutual information of the choices in the trace.
        chance: what the same number of choices shows, on average, when there is nothing to tell; NaN if not tried.
        p_value: how often chance shows as much or more; NaN if not tried.
        ceiling: all there is to tell.
        num_rows: choices that were counted.
    """

    bits: float
    chance: float
    p_value: float
    ceiling: float
    num_rows: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON has it, None for NaN."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def about_domain(trace: RoutingTrace, *, num_shuffles: int = 1999, seed: int = 0) -> list[Information]:
    """For each layer: how much does the chosen expert tell about the domain of the text?

    ``I(e; q) = sum_eq p(e, q) log2(p(e, q) / (p(e) p(q)))`` over the choices of rows with a known domain; its ceiling
    is the entropy of the domains.

    Chance is measured by giving whole sequences each other's domains: tokens of one text are alike, so shuffling
    single tokens would call any two texts significantly different. The p-value is
    ``(1 + #{shuffles that reach bits}) / (1 + num_shuffles)``.
    """
    rng = np.random.default_rng(seed)
    result = []
    for layer, num_experts in enumerate(trace.metadata.num_experts):
        rows = np.flatnonzero((trace.layer == layer) & (trace.domain >= 0))
        text_key = trace.sequence[rows].astype(np.int64) << 16 | trace.domain[rows]
        texts, text = _numbered(text_key)
        # One row for each piece of text, one column for each expert.
        count_SE = _table(text, trace.expert[rows], len(texts), num_experts)
        kinds, kind_S = np.unique(texts & 0xFFFF, return_inverse=True)
        one_hot_QS = (kind_S == np.arange(len(kinds))[:, None]).astype(np.float64)
        drawn = [mutual_information(rng.permutation(one_hot_QS, axis=1) @ count_SE) for _ in range(num_shuffles)]
        bits, ceiling = mutual_information(one_hot_QS @ count_SE), entropy(one_hot_QS @ count_SE.sum(axis=1))
        result.append(_told(bits, drawn, ceiling, len(rows)))
    return result


def about_token(trace: RoutingTrace, *, num_shuffles: int = 99, seed: int = 0) -> list[Information]:
    """For each layer: how much does the token alone tell about the chosen expert?

    ``I(e; t)``, as for :func:`about_domain` with token ids in the place of domains; its ceiling is the entropy of the
    experts.

    Chance is measured by holding the choices against another part of the text (see ``chance.py``). Do not read the bits
    without it: with V tokens and N choices, counting alone shows about ``(E - 1)(V - 1) / (2 N ln 2)`` bits (Miller
    1955).
    """
    result = []
    for read in readings(trace):
        read = read.take(read.token_T >= 0)
        tokens, token_T = np.unique(read.token_T, return_inverse=True)
        taken_TK = read.expert_TK >= 0
        expert_N, size_T = read.expert_TK[taken_TK], taken_TK.sum(axis=1)
        line_N = np.repeat(np.arange(len(size_T)), size_T)
        shape = (len(tokens), read.num_experts)
        bits, *drawn = (
            mutual_information(_table(turned_T[line_N], expert_N, *shape))
            for turned_T in (token_T, *shifted(token_T, num_shuffles, seed))
        )
        result.append(_told(bits, drawn, entropy(np.bincount(expert_N)), len(expert_N)))
    return result


def about_next_layer(trace: RoutingTrace, *, num_shuffles: int = 99, seed: int = 0) -> list[Information]:
    """For each layer but the last: how much does its first choice tell about the first choice of the next one?

    ``I(e_l; e_(l+1))`` over the tokens that both layers took; its ceiling is the entropy of the next layer's choices.
    Chance is measured by holding the two layers' choices against each other at different places of the text.
    """
    result = []
    for layer in range(trace.num_layers - 1):
        one, other = pairs(reading(trace, layer), reading(trace, layer + 1))
        first_T, next_T = first_choices(one), first_choices(other)
        shape = (one.num_experts, other.num_experts)
        count_EE = _table(first_T, next_T, *shape)
        drawn = [mutual_information(_table(first_T, turn_T, *shape)) for turn_T in shifted(next_T, num_shuffles, seed)]
        result.append(_told(mutual_information(count_EE), drawn, entropy(count_EE.sum(axis=0)), len(first_T)))
    return result


def mutual_information(count: npt.NDArray[Any]) -> float:
    """Of two variables, from the table of how often each pair was seen: H(row) + H(column) - H(both), in bits."""
    return max(0.0, entropy(count.sum(axis=1)) + entropy(count.sum(axis=0)) - entropy(count.ravel()))


def entropy(count: npt.NDArray[Any]) -> float:
    """``-sum_i p_i log2 p_i`` of how often each value was seen, in bits; 0 where nothing was seen."""
    seen = count[count > 0].astype(np.float64)
    total = seen.sum()
    if total == 0:
        return 0.0
    return float(np.log2(total) - seen @ np.log2(seen) / total + 0.0)


def _told(bits: float, drawn: Sequence[float], ceiling: float, num_rows: int) -> Information:
    chance = float(np.mean(drawn)) if drawn else float("nan")
    return Information(bits=bits, chance=chance, p_value=p_value(bits, drawn), ceiling=ceiling, num_rows=num_rows)


def _numbered(key: IntArray) -> tuple[IntArray, IntArray]:
    """``np.unique`` with inverse, quick where equal keys mostly stand together."""
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    values, inverse = np.unique(key[starts], return_inverse=True)
    return values, np.repeat(inverse, np.diff(starts, append=len(key)))


def _table(row: npt.NDArray[Any], column: npt.NDArray[Any], num_rows: int, num_columns: int) -> IntArray:
    flat = row.astype(np.int64) * num_columns + column
    return np.bincount(flat, minlength=num_rows * num_columns).reshape(num_rows, num_columns)
