"""Vocabulary: which expert each token prefers, and which tokens each expert prefers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.lens.measures.chance import shifted
from moesaic.lens.measures.measured import FloatArray, IntArray, Measured
from moesaic.lens.measures.reading import Reading, reading, readings
from moesaic.lens.tokens import token_text
from moesaic.telemetry.trace import RoutingTrace


def vocabulary_specialisation(
    trace: RoutingTrace, *, first_only: bool = True, min_tokens: int = 1, num_shifts: int = 9
) -> Measured:
    """How faithful the average token is to its preferred expert, shape (L,).

    ``mean_x max_e N(x, e) / N(x)`` over the token ids x that occur ``min_tokens`` times or more: ``N(x)`` times in all,
    ``N(x, e)`` times with expert e as its best (or, if not ``first_only``, among its choices).

    A token that occurs once is always faithful, so the number means nothing without chance: the same choices held
    against another part of the text, ``num_shifts`` times.

    Source:
        Muennighoff et al. 2024, arXiv:2409.02060, section 5.4; they take first choices.
    """
    value_L, chance_L = np.full((2, trace.num_layers), np.nan)
    count_L = np.zeros(trace.num_layers, dtype=np.int64)
    for layer, read in enumerate(readings(trace)):
        read = read.take(read.token_T >= 0)
        token_T = np.unique(read.token_T, return_inverse=True)[1]
        often_V = np.bincount(token_T) >= min_tokens
        count_L[layer] = often_V.sum()
        if count_L[layer]:
            value_L[layer] = _faithfulness(read, token_T, often_V, first_only)
            turned = shifted(token_T, num_shifts, seed=0)
            chance_L[layer] = np.mean(
                [_faithfulness(read, turned_T, often_V, first_only) for turned_T in turned] or [np.nan]
            )
    return Measured.of(value_L, chance_L, count_L, "token ids")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenTable:
    """What one layer does with each token id, the commonest first.

    Attributes:
        token_id_V: the token ids.
        count_V: how often each occurs.
        expert_V: the expert that each goes to most often, the lowest of equals.
        share_V: how often it does, of all its occurrences.
        low_V: lower end of that share's 95 % interval (Wilson 1927).
        high_V: its upper end.
        base_V: how often any token goes to that expert: what chance would give.
    """

    token_id_V: IntArray
    count_V: IntArray
    expert_V: IntArray
    share_V: FloatArray
    low_V: FloatArray
    high_V: FloatArray
    base_V: FloatArray


def token_table(trace: RoutingTrace, layer: int, *, first_only: bool = True, min_tokens: int = 1) -> TokenTable:
    """Each token's preferred expert in a layer, and its share: where does ``:`` go, where ``who``?

    Args:
        first_only: by the best choice of each occurrence; otherwise by all of them, and shares add up to K.
        min_tokens: leave out token ids that occur less often.
    """
    read = reading(trace, layer)
    read = read.take(read.token_T >= 0)
    tokens, token_T = np.unique(read.token_T, return_inverse=True)
    count_VE = _count(read, token_T, len(tokens), first_only)
    count_V = np.bincount(token_T, minlength=len(tokens))
    expert_V = count_VE.argmax(axis=1)
    base_E = count_VE.sum(axis=0) / max(1, read.num_tokens)
    share_V = count_VE.max(axis=1) / np.maximum(1, count_V)
    low_V, high_V = wilson(share_V, count_V)
    order = np.argsort(-count_V, kind="stable")
    order = order[count_V[order] >= min_tokens]
    return TokenTable(
        token_id_V=tokens[order],
        count_V=count_V[order],
        expert_V=expert_V[order],
        share_V=share_V[order],
        low_V=low_V[order],
        high_V=high_V[order],
        base_V=base_E[expert_V][order],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferredToken:
    """A token that an expert takes more often than its other work would lead one to expect.

    Attributes:
        token_id: the token.
        text: what a reader sees of it, see ``visible``.
        share: the part of the token's choices in this layer that went to the expert.
        lift: ``share`` over the expert's share of all choices in this layer.
        num_rows: the token's choices in this layer.
    """

    token_id: int
    text: str
    share: float
    lift: float
    num_rows: int


def preferred_tokens(
    trace: RoutingTrace, layer: int, *, limit: int = 10, min_rows: int = 30
) -> list[list[PreferredToken]]:
    """For each expert of a layer, the tokens that it prefers, best first.

    A token's lift is ``(rows[t, e] / rows[t]) / (rows[e] / rows)``. Tokens with fewer than ``min_rows`` rows are left
    out, and the rest are ranked by the lift's lower bound, with the Wilson 95 % interval's lower end in the place of
    ``rows[t, e] / rows[t]``, so that a rare token must show a stronger preference than a common one. Only tokens whose
    lower bound is above 1 are preferred at all.
    """
    read = reading(trace, layer)
    read = read.take(read.token_T >= 0)
    tokens, token_T = np.unique(read.token_T, return_inverse=True)
    count_VE = _count(read, token_T, len(tokens), first_only=False)
    rows_V = count_VE.sum(axis=1)
    base_E = count_VE.sum(axis=0) / max(1, count_VE.sum())
    share_VE = count_VE / np.maximum(1, rows_V)[:, None]
    bound_VE = wilson(share_VE, rows_V[:, None])[0]
    result: list[list[PreferredToken]] = []
    for expert in range(read.num_experts):
        if base_E[expert] == 0:
            result.append([])
            continue
        bound_V = np.where(rows_V >= min_rows, bound_VE[:, expert] / base_E[expert], 0.0)
        best = [index for index in np.argsort(-bound_V, kind="stable")[:limit] if bound_V[index] > 1]
        result.append(
            [
                PreferredToken(
                    token_id=int(tokens[index]),
                    text=token_text(trace, int(tokens[index])),
                    share=float(share_VE[index, expert]),
                    lift=float(share_VE[index, expert] / base_E[expert]),
                    num_rows=int(rows_V[index]),
                )
                for index in best
            ]
        )
    return result


def wilson(share: npt.NDArray[Any], count: npt.NDArray[Any]) -> tuple[FloatArray, FloatArray]:
    """Both ends of the 95 % interval of a share that was counted ``count`` times.

    Source:
        Wilson 1927, J. Am. Stat. Assoc. 22.
    """
    z = 1.96
    count = np.maximum(count, 1)
    centre = share + z**2 / (2 * count)
    spread = z * np.sqrt(np.maximum(share * (1 - share), 0) / count + z**2 / (4 * count**2))
    return (centre - spread) / (1 + z**2 / count), (centre + spread) / (1 + z**2 / count)


def _count(read: Reading, token_T: IntArray, num_tokens: int, first_only: bool) -> IntArray:
    """How often each token id has each expert, shape (V, E)."""
    expert_TK = read.expert_TK[:, : 1 if first_only else None]
    flat_N = (token_T[:, None] * read.num_experts + expert_TK)[expert_TK >= 0]
    count = np.bincount(flat_N, minlength=num_tokens * read.num_experts)
    return count.reshape(num_tokens, read.num_experts)


def _faithfulness(read: Reading, token_T: IntArray, often_V: npt.NDArray[np.bool_], first_only: bool) -> float:
    count_V = np.bincount(token_T, minlength=len(often_V))
    most_V = _count(read, token_T, len(often_V), first_only).max(axis=1)
    return float((most_V[often_V] / count_V[often_V]).mean())
