"""Weighted least squares for many weightings of the same rows at once, and the damping that keeps it solvable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moesaic.classic.tree import Floats

RIDGE = 1e-8
"""Share of each input's own sum of squares that is added to it: what decides where the data do not."""

_CHUNK_NUMBERS = 2**18
"""Products of inputs that are held at a time: 2 MiB, which stays in a processor's cache."""


def weighted_grams(x_TD: Floats, weights: Floats | Callable[[slice], Floats]) -> Floats:
    """``Σ_t w_te x_t x_tᵀ`` for E weightings at once: a matrix product over the distinct pairs of inputs.

    Args:
        x_TD: inputs.
        weights: a column for each weighting (T, E), or what gives the columns of some rows, where there are too many
            to be held for all rows.
    Shape:
        ``(E, D, D)``.
    """
    columns = weights.__getitem__ if isinstance(weights, np.ndarray) else weights
    width = x_TD.shape[1]
    starts = np.concatenate([[0], np.cumsum(np.arange(width, 0, -1))])
    x_DT = np.ascontiguousarray(x_TD.T)
    size = max(64, _CHUNK_NUMBERS // int(starts[-1]))
    products = np.empty((int(starts[-1]), size))
    flat: Floats | float = 0.0
    for start in range(0, max(1, len(x_TD)), size):
        rows = slice(start, min(start + size, len(x_TD)))
        some_DT = x_DT[:, rows]
        pairs = products[:, : some_DT.shape[1]]
        for one in range(width):
            np.multiply(some_DT[one], some_DT[one:], out=pairs[starts[one] : starts[one + 1]])
        flat = flat + pairs @ columns(rows)
    assert isinstance(flat, np.ndarray)
    first, second = np.triu_indices(width)
    gram_EDD = np.empty((flat.shape[1], width, width))
    gram_EDD[:, first, second] = flat.T
    gram_EDD[:, second, first] = flat.T
    return gram_EDD


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
    equal_EDD = gram_EDD / root_ED[..., :, None] / root_ED[..., None, :]
    equal_EDD += RIDGE * np.eye(len(scale_D))
    solved: Floats = np.linalg.solve(equal_EDD, right_ED1 / root_ED[..., None]) / root_ED[..., None]
    return solved
