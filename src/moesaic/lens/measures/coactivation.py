"""Co-activation: which experts work on the same token."""

from __future__ import annotations

import numpy as np

from moesaic.lens.measures.counts import exists_LE
from moesaic.lens.measures.measured import IntArray, Measured, divide
from moesaic.lens.measures.no_preference import meeting_by_chance
from moesaic.lens.measures.reading import Reading, readings
from moesaic.telemetry.trace import RoutingTrace


def coactivation(trace: RoutingTrace) -> Measured:
    """Of the tokens that expert i took, what part expert j took too: ``N(i, j) / N(i)``, shape (L, E, E).

    All pairs of a token's choices count, whatever their ranks. The diagonal, always 1, is NaN; so is the row of an
    expert without tokens. Each row sums to the other experts that its tokens have, ``K - 1``.

    Chance is a router that leaves each expert its load and has no opinion on who goes with whom, see
    ``no_preference.py``. For even loads that is ``(K - 1) / (E - 1)``; a busy expert is met more often by all.

    Source:
        Muennighoff et al. 2024, arXiv:2409.02060, section 5.2. Their script counts only experts of
        neighbouring ranks; this counts what their formula says.
    """
    exists = exists_LE(trace)
    shape = (*exists.shape, exists.shape[1])
    value_LEE, chance_LEE = np.full(shape, np.nan), np.full(shape, np.nan)
    count_LE1 = np.zeros((*exists.shape, 1), dtype=np.int64)
    for layer, read in enumerate(readings(trace)):
        both_EE, end = _together(read), read.num_experts
        taken_E1 = both_EE.diagonal()[:, None].copy()
        count_LE1[layer, :end] = taken_E1
        value_LEE[layer, :end, :end] = divide(both_EE, taken_E1)
        if read.num_tokens:
            size_K = np.bincount((read.expert_TK >= 0).sum(axis=1)) / read.num_tokens
            rate_E1 = taken_E1 / read.num_tokens
            chance_LEE[layer, :end, :end] = divide(meeting_by_chance(rate_E1[:, 0], size_K), rate_E1)
    value_LEE[:, np.arange(shape[1]), np.arange(shape[1])] = np.nan
    return Measured.of(value_LEE, chance_LEE, count_LE1, "tokens of the first expert")


def _together(read: Reading) -> IntArray:
    """For each pair of experts the tokens that both took; on the diagonal, those that one took."""
    from scipy.sparse import csr_array

    token_N, slot_N = np.nonzero(read.expert_TK >= 0)
    shape = (read.num_tokens, read.num_experts)
    taken_TE = csr_array((np.ones(len(token_N), dtype=np.int64), (token_N, read.expert_TK[token_N, slot_N])), shape)
    both_EE: IntArray = (taken_TE.T @ taken_TE).toarray()
    return both_EE
