"""Weighted least squares for many weightings of the same rows at once, and the damping that keeps it solvable."""

from __future__ import annotations

import numpy as np

from moesaic.classic.cores import summed
from moesaic.classic.tree import Floats

RIDGE = 1e-8
"""Share of each input's own sum of squares that is added to it: what decides where the data do not."""


def pair_products(values_DT: Floats) -> Floats:
    """Products of each with itself and with those after it: ``x_a x_b`` for a ≤ b, as ``np.triu_indices`` has them.

    Args:
        values_DT: the first dimension is multiplied with itself, the others go along.
    """
    width = len(values_DT)
    values_DT = np.ascontiguousarray(values_DT)
    products = np.empty((num_pairs(width), *values_DT.shape[1:]))
    start = 0
    for one in range(width):
        np.multiply(values_DT[one], values_DT[one:], out=products[start : start + width - one])
        start += width - one
    return products


def num_pairs(width: int) -> int:
    """How many products those are."""
    return width * (width + 1) // 2


def from_pairs(flat: Floats, width: int) -> Floats:
    """Symmetric matrices (…, D, D) from what is above their diagonals and on them (…, pairs)."""
    first, second = np.triu_indices(width)
    matrices = np.empty((*flat.shape[:-1], width, width))
    matrices[..., first, second] = flat
    matrices[..., second, first] = flat
    return matrices


def weighted_grams(x_TD: Floats, weight_TE: Floats) -> Floats:
    """``Σ_t w_te x_t x_tᵀ`` for E weightings at once: a matrix product over the distinct pairs of inputs.

    Shape:
        ``(E, D, D)``.
    """
    width, num_weightings = x_TD.shape[1], weight_TE.shape[1]

    def part(rows: slice) -> tuple[Floats]:
        return ((pair_products(x_TD[rows].T) @ weight_TE[rows]).T,)

    return from_pairs(summed(len(x_TD), num_pairs(width) + num_weightings, part)[0], width)


def damped_solve(gram_EDD: Floats, right_ED1: Floats, scale_D: Floats) -> Floats:
    """Solve ``(G + ridge) s = r``, the ridge being a :data:`RIDGE` of each input's scale.

    Used for steps, never for positions: a parameter that no row speaks for stays where it is, one that all rows agree
    on arrives exactly, and no step lowers what is climbed.

    Args:
        gram_EDD: positive semidefinite matrices.
        right_ED1: right-hand sides, as columns.
        scale_D: each input's sum of squares over all rows, with their own weights; where a matrix has more on its
            diagonal, that counts.
    """
    diagonal_ED = np.diagonal(gram_EDD, axis1=-2, axis2=-1)
    root_ED = np.sqrt(np.maximum(diagonal_ED, np.where(scale_D > 0, scale_D, 1.0)))
    equal_EDD = gram_EDD / root_ED[..., :, None]
    equal_EDD /= root_ED[..., None, :]
    at = np.arange(len(scale_D))
    equal_EDD[..., at, at] += RIDGE
    solved: Floats = np.linalg.solve(equal_EDD, right_ED1 / root_ED[..., None]) / root_ED[..., None]
    return solved
