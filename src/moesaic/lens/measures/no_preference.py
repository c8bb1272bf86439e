"""How often experts meet on a token by chance: the router that has loads, and no opinion on who goes with whom."""

from __future__ import annotations

import numpy as np

from moesaic.lens.measures.measured import FloatArray

_MOST_ROUNDS = 200
# An expert on every token would need a weight without end.
_NEARLY_ALL = 1 - 1e-9


def meeting_by_chance(rate_E: FloatArray, size_K: FloatArray) -> FloatArray:
    """What part of all tokens each pair of experts would share, if nothing but their loads mattered.

    A token of k experts takes the set S with probability ``prod_(e in S) w_e / sum_(|S'| = k) prod_(e in S') w_e``:
    of all ways to choose k of E that leave each expert its load, the one with most entropy. The weights ``w`` are
    fitted step by step.

    Args:
        rate_E: part of the tokens that each expert takes.
        size_K: part of the tokens that have 0, 1, 2 … experts.
    Returns:
        Shape (E, E), the diagonal empty. For even loads of K experts each, ``K (K - 1) / (E (E - 1))``.

    Source:
        Chen, Dempster and Liu 1994, Biometrika 81 (conditional Bernoulli, maximum entropy).
    """
    odds_E = _odds(rate_E)
    weight_E = odds_E.copy()
    for _ in range(_MOST_ROUNDS):
        expected_E = weight_E * _sets_with(weight_E[None], size_K, others=1)[0]
        # By odds, or an expert on nearly all tokens creeps; half of the way, or two experts swing for ever.
        factor_E = np.sqrt(np.divide(odds_E, _odds(expected_E), out=np.ones_like(odds_E), where=odds_E > 0))
        weight_E = weight_E * factor_E
        if np.allclose(factor_E, 1, rtol=0, atol=1e-8):
            break
    # Row i counts the sets without i: its weight there is nothing.
    without_EE = np.where(np.eye(len(weight_E), dtype=bool), 0, weight_E)
    met_EE = weight_E[:, None] * weight_E * _sets_with(without_EE, size_K, others=2, all_E=weight_E)
    np.fill_diagonal(met_EE, 0)
    return met_EE


def _odds(rate_E: FloatArray) -> FloatArray:
    rate_E = np.minimum(rate_E, _NEARLY_ALL)
    return rate_E / (1 - rate_E)


def _sets_with(
    weight_BE: FloatArray, size_K: FloatArray, *, others: int, all_E: FloatArray | None = None
) -> FloatArray:
    """For each expert, ``sum_k size_k e_(k - others)(weights without it) / e_k(all weights)``, shape (B, E).

    ``e_k`` is the sum over all sets of k of the product of their weights. Sums of products only: the shorter way by
    division loses every digit for an expert that takes nearly all tokens.
    """
    end = len(size_K)
    before, behind = _sums(weight_BE, end), _sums(weight_BE[:, ::-1], end)[::-1]
    total_K = _sums(all_E[None], end)[-1, 0] if all_E is not None else before[-1, 0]
    found_BE = np.zeros(weight_BE.shape)
    for size in range(others, end):
        if size_K[size] and total_K[size] > 0:
            left = size - others
            # Of the k - 1 others, some stand before the expert and the rest behind it.
            without_EB = (before[:-1, :, : left + 1] * behind[1:, :, left::-1]).sum(axis=2)
            found_BE += size_K[size] * without_EB.T / total_K[size]
    return found_BE


def _sums(weight_BE: FloatArray, end: int) -> FloatArray:
    """``e_k`` of the first 0, 1, 2 … weights for each k below ``end``, shape (E + 1, B, end)."""
    num_rows, num_experts = weight_BE.shape
    sums = np.zeros((num_experts + 1, num_rows, end))
    sums[0, :, 0] = 1
    for expert in range(num_experts):
        sums[expert + 1] = sums[expert]
        sums[expert + 1, :, 1:] += weight_BE[:, expert, None] * sums[expert, :, :-1]
    return sums
