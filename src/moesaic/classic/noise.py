"""How the variance of Gaussian experts is come by: given, one for all, or one for each expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesaic.classic.cores import summed
from moesaic.classic.tree import Floats

NoiseKind = Literal["fixed", "shared", "expert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """The rule that estimates φ from weighted residuals.

    Attributes:
        kind: ``fixed`` where φ stays what it is, ``shared`` for one of each output, ``expert`` for one of each output
            and expert.
        floor_O: the least that it may be: an expert on one row alone would have a likelihood without limit.
    """

    kind: NoiseKind
    floor_O: Floats

    def estimate(self, dispersion_EO: Floats, y_TO: Floats, mean_TEO: Floats, share_TE: Floats) -> Floats:
        """φ of the greatest expected likelihood; an expert without rows keeps the one that it has."""
        if self.kind == "fixed":
            return dispersion_EO

        def part(rows: slice) -> tuple[Floats]:
            squares_TEO = (y_TO[rows, None, :] - mean_TEO[rows]) ** 2
            return (np.einsum("te,teo->eo", share_TE[rows], squares_TEO),)

        (squares_EO,) = summed(len(y_TO), 4 * dispersion_EO.size, part)
        total_E1 = share_TE.sum(axis=0)[:, None]
        if self.kind == "shared":
            each_EO = np.broadcast_to(squares_EO.sum(axis=0) / total_E1.sum(), dispersion_EO.shape)
        else:
            is_there_E1 = total_E1 > 1e-12 * total_E1.sum()
            each_EO = np.where(is_there_E1, squares_EO / np.where(is_there_E1, total_E1, 1.0), dispersion_EO)
        floored: Floats = np.maximum(each_EO, self.floor_O)
        return floored
