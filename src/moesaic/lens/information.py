"""What an expert's number tells: mutual information, in bits, beside what chance alone would show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.lens.metrics import FloatArray
from moesaic.telemetry.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True, slots=True)
class Information:
    """How much one layer's choice of expert tells about something, in bits.

    Attributes:
        bits: mutual information of the choices in the trace.
        chance: what the same number of choices shows, on average, when there is nothing to tell.
        p_value: how often chance shows as much or more; NaN where it was not tested.
        ceiling: all there is to tell, the entropy of what is told about.
        num_rows: choices that were counted.
    """

    bits: float
    chance: float
    p_value: float
    ceiling: float
    num_rows: int


def about_domain(trace: RoutingTrace, *, num_shuffles: int = 1999, seed: int = 0) -> list[Information]:
    """For each layer: how much does the chosen expert tell about the domain of the text?

    ``I(e; q) = sum_eq p(e, q) log2(p(e, q) / (p(e) p(q)))`` over the choices of rows with a known domain.

    Chance is measured by giving whole sequences each other's domains: tokens of one text are alike, so shuffling
    single tokens would call any two texts significantly different. The p-value is
    ``(1 + #{shuffles that reach bits}) / (1 + num_shuffles)``.
    """
    rng = np.random.default_rng(seed)
    result = []
    for layer, num_experts in enumerate(trace.metadata.num_experts):
        rows = (trace.layer == layer) & (trace.domain >= 0)
        sequence, domain, expert = trace.sequence[rows], trace.domain[rows], trace.expert[rows]
        text_key = sequence.astype(np.int64) << 16 | domain.astype(np.int64)
        texts, text = np.unique(text_key, return_inverse=True)
        # One row for each piece of text, one column for each expert.
        count_SE = _table(text, expert, len(texts), num_experts)
        domain_S = (texts & 0xFFFF).astype(np.int64)
        kinds, kind_S = np.unique(domain_S, return_inverse=True)
        one_hot_QS = (kind_S == np.arange(len(kinds))[:, None]).astype(np.float64)
        bits = _mutual_information(one_hot_QS @ count_SE)
        shuffled = [_mutual_information(rng.permutation(one_hot_QS, axis=1) @ count_SE) for _ in range(num_shuffles)]
        result.append(
            Information(
                bits=bits,
                chance=float(np.mean(shuffled)) if shuffled else float("nan"),
                # The tiny slack keeps rounding from splitting ties.
                p_value=(1 + sum(value >= bits - 1e-12 for value in shuffled)) / (1 + num_shuffles),
                ceiling=_entropy(one_hot_QS @ count_SE.sum(axis=1)),
                num_rows=len(expert),
            )
        )
    return result


def about_token(trace: RoutingTrace) -> list[Information]:
    """For each layer: how much does the token alone tell about the chosen expert?

    ``I(e; t)``, as above with token ids in the place of domains; its ceiling is the entropy of the experts. Chance is
    the bias of counting finite samples, ``(E' - 1)(V' - 1) / (2 N ln 2)`` bits with E' experts and V' tokens seen
    (Miller 1955).
    """
    result = []
    for layer, num_experts in enumerate(trace.metadata.num_experts):
        rows = (trace.layer == layer) & (trace.token_id >= 0)
        expert = trace.expert[rows]
        tokens, token = np.unique(trace.token_id[rows], return_inverse=True)
        count_VE = _table(token, expert, len(tokens), num_experts)
        num_used = int((count_VE.sum(axis=0) > 0).sum())
        bias = max(0, num_used - 1) * max(0, len(tokens) - 1) / (2 * max(1, len(expert)) * np.log(2))
        ceiling = _entropy(count_VE.sum(axis=0))
        result.append(
            Information(
                bits=_mutual_information(count_VE),
                chance=min(float(bias), ceiling),
                p_value=float("nan"),
                ceiling=ceiling,
                num_rows=len(expert),
            )
        )
    return result


def _table(row: npt.NDArray[Any], column: npt.NDArray[Any], num_rows: int, num_columns: int) -> FloatArray:
    flat = row.astype(np.int64) * num_columns + column
    return np.bincount(flat, minlength=num_rows * num_columns).reshape(num_rows, num_columns).astype(np.float64)


def _mutual_information(count: FloatArray) -> float:
    """Of two variables, from the table of how often each pair was seen: H(row) + H(column) - H(both), in bits."""
    return max(0.0, _entropy(count.sum(axis=1)) + _entropy(count.sum(axis=0)) - _entropy(count.ravel()))


def _entropy(count: FloatArray) -> float:
    total = count.sum()
    if total == 0:
        return 0.0
    p = count[count > 0] / total
    # Adding 0.0 turns -0.0 into 0.0.
    return float(-(p * np.log2(p)).sum() + 0.0)
