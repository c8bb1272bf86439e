"""Neighbours: how often the next token of a text stays with an expert."""

from __future__ import annotations

from math import comb

import numpy as np
import numpy.typing as npt

from moesaic.lens.measures.measured import IntArray, Measured
from moesaic.lens.measures.pairs import experts_as_bits, overlap
from moesaic.lens.measures.reading import readings
from moesaic.telemetry.trace import RoutingTrace

# Chance over all choices is drawn: enough pairs for three digits, and an end of it for short texts.
_PAIRS_DRAWN = 500_000
_MOST_DRAWS = 100


def repetition(trace: RoutingTrace, *, first_only: bool = True, same_text: bool = False) -> Measured:
    """How often a token has an expert of the token before it, shape (L,).

    With ``first_only``: ``#{i: e_i = e_(i+1)} / #{neighbours i, i+1 of one sequence}`` over first choices. Otherwise
    over all choices: ``#{i: the experts of i and of i+1 share one} / #neighbours``.

    Chance, from the layer's own choices: how often any two of its tokens share an expert. It is ``sum_e p_e^2`` for
    first choices, at least ``1 / E``; over all choices each token is paired with others at random, 100 times or until
    there are half a million pairs.

    Args:
        same_text: take chance from two different tokens of one sequence instead. What is above it comes from being
            neighbours; what lies between the two chances comes from being of one text.

    Source:
        Jiang et al. 2024, arXiv:2401.04088, section 5, table 5; there chance is :func:`uniform_repetition`.
    """
    value_L, chance_L = np.full((2, trace.num_layers), np.nan)
    count_L = np.zeros(trace.num_layers, dtype=np.int64)
    for layer, read in enumerate(readings(trace)):
        # A jump to the next sequence is far more than one place.
        left = np.flatnonzero(np.diff(read.place_T) == 1)
        count_L[layer] = len(left)
        if not len(left):
            continue
        expert_TK = read.expert_TK[:, : 1 if first_only else None]
        experts = experts_as_bits(expert_TK, read.num_experts)
        value_L[layer] = (overlap(experts[left], experts[left + 1]) > 0).mean()
        text_T = np.unique(read.sequence_T, return_inverse=True)[1] if same_text else np.zeros(read.num_tokens, int)
        chance_L[layer] = _chance_of_first(expert_TK[:, 0], text_T) if first_only else _chance_of_any(experts, text_T)
    return Measured.of(value_L, chance_L, count_L, "pairs of neighbours")


def uniform_repetition(num_experts: int, top_k: int, *, first_only: bool) -> float:
    """What :func:`repetition` would be if all experts were equally likely.

    ``1 / E`` for first choices, ``1 - C(E - K, K) / C(E, K)`` for all of them: 1/8 and 13/28 for Mixtral.
    """
    return 1 / num_experts if first_only else 1 - comb(num_experts - top_k, top_k) / comb(num_experts, top_k)


def _chance_of_first(first_T: IntArray, text_T: IntArray) -> float:
    """How often two tokens of a text have the same first choice, each text as often as it has neighbours."""
    num_experts = int(first_T.max()) + 1
    flat_T = text_T * num_experts + first_T
    count_SE = np.bincount(flat_T, minlength=(int(text_T.max()) + 1) * num_experts).reshape(-1, num_experts)
    tokens_S = count_SE.sum(axis=1)
    if len(tokens_S) == 1:
        return float(np.square(count_SE / tokens_S).sum())
    # A text of T tokens has T - 1 pairs of neighbours and T (T - 1) ordered pairs of different tokens.
    return float(((count_SE * (count_SE - 1)).sum(axis=1) / tokens_S).sum() / (tokens_S - 1).sum())


def _chance_of_any(experts: npt.NDArray[np.uint64], text_T: IntArray) -> float:
    """How often two tokens of a text share an expert, each text as often as it has neighbours; by drawing pairs."""
    rng = np.random.default_rng(0)
    tokens_S = np.bincount(text_T)
    paired = np.flatnonzero(tokens_S[text_T] > 1)
    start_T, length_T = (tokens_S.cumsum() - tokens_S)[text_T[paired]], tokens_S[text_T[paired]]
    # A text of T tokens has T - 1 pairs of neighbours.
    weight_T = (length_T - 1) / length_T
    found = []
    for _ in range(int(np.clip(_PAIRS_DRAWN // len(paired), 1, _MOST_DRAWS))):
        # Any other token of the text: one to T - 1 places on, round and round.
        other = start_T + (paired - start_T + rng.integers(1, length_T)) % length_T
        shared_T = overlap(experts[paired], experts[other]) > 0
        found.append(float(weight_T @ shared_T / weight_T.sum()))
    return float(np.mean(found))
