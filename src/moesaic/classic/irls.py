"""Iteratively reweighted least squares: Newton's method for experts of every family, and for gates.

Weighted least squares is the case of a Gaussian, where one step arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from moesaic.classic.cores import summed
from moesaic.classic.data import Data
from moesaic.classic.family import Family
from moesaic.classic.least_squares import damped_solve, from_pairs, num_pairs, pair_products
from moesaic.classic.tree import Floats, Indices

_HALVINGS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearFit:
    """E linear maps to be fitted to the same inputs: maximise ``Σ_t target_t · η_t − weight_t A(η_t)`` less a penalty.

    Attributes:
        data: gives the inputs.
        family: whose log partition A is.
        target_TEO: soft targets, already times their weights.
        weight_TE: weight of each row for each map.
        penalty_EO: strength of the penalty on half the squared slopes; the constant is left alone.
    Source:
        Jordan and Jacobs 1994, appendix A; the full multinomial Hessian in place of its diagonal.
    """

    data: Data
    family: Family
    target_TEO: Floats
    weight_TE: Floats
    penalty_EO: Floats

    def newton(self, coef_EOD: Floats, steps: int = 1) -> Floats:
        """Take damped Newton steps, each halved until it does not lower what its map climbs."""
        if self.family.coupled:
            # What all η have in common changes no probability, but the penalty.
            coef_EOD = coef_EOD - coef_EOD.mean(axis=1, keepdims=True)
        for _ in range(1 if self.family.is_gaussian else steps):
            score_EOD, pairs, climbed_E = self._sums(coef_EOD)
            score_EOD -= self.penalty_EO[..., None] * slopes(coef_EOD)
            direction = self._coupled_direction if self.family.coupled else self._direction
            step_EOD = direction(score_EOD, pairs)
            if not self.family.is_gaussian:
                step_EOD = self._halved(coef_EOD, step_EOD, climbed_E)
            coef_EOD = coef_EOD + step_EOD
        return coef_EOD

    def _sums(self, coef_EOD: Floats) -> tuple[Floats, Floats, Floats]:
        """The score (E, O, D), the Hessian's parts (curvatures, pairs of inputs), and what is climbed (E,)."""
        is_gaussian = self.family.is_gaussian
        num_maps, num_outputs, width = coef_EOD.shape

        def part(rows: slice) -> tuple[Floats, Floats, Floats]:
            x_TD, weight_TE = self.data.x_TD[rows], self.weight_TE[rows]
            eta_TEO = linear(x_TD, coef_EOD)
            mean_TEO = self.family.mean(eta_TEO)
            residual_TEO = self.target_TEO[rows] - weight_TE[..., None] * mean_TEO
            score_EOD = (residual_TEO.reshape(len(x_TD), -1).T @ x_TD).reshape(coef_EOD.shape)
            climbed_E = np.zeros(num_maps) if is_gaussian else self._climbed_by(rows, eta_TEO)
            return score_EOD, self._curvatures(weight_TE, mean_TEO) @ pair_products(x_TD.T).T, climbed_E

        kinds = num_pairs(num_outputs) if self.family.coupled else num_outputs
        score_EOD, pairs, climbed_E = summed(len(self.data.x_TD), num_pairs(width) + num_maps * kinds, part)
        return score_EOD, pairs, climbed_E - self._penalty(coef_EOD)

    def _curvatures(self, weight_TE: Floats, mean_TEO: Floats) -> Floats:
        """What rows weigh in the parts of the Hessian (parts, T)."""
        if self.family.is_gaussian:
            return weight_TE.T
        if not self.family.coupled:
            curvature_TEO: Floats = weight_TE[..., None] * self.family.curvature(mean_TEO)
            return curvature_TEO.reshape(len(weight_TE), -1).T
        # diag(p) − p pᵀ has rows that sum to 0, so that the last output's need not be known.
        weight_ET, mean_OET = np.ascontiguousarray(weight_TE.T), np.ascontiguousarray(mean_TEO.T[:-1])
        products = pair_products(mean_OET)
        products *= -weight_ET
        products[_diagonal(len(mean_OET))] = weight_ET * mean_OET * (1 - mean_OET)
        return products.reshape(-1, len(weight_TE))

    def _direction(self, score_EOD: Floats, pairs: Floats) -> Floats:
        num_maps, _, width = score_EOD.shape
        gram_EODD = from_pairs(pairs, width).reshape(num_maps, -1, width, width)
        gram_EODD = gram_EODD + self.penalty_EO[..., None, None] * _on_slopes(width)
        return damped_solve(gram_EODD, score_EOD[..., None], self.data.scale_D)[..., 0]

    def _coupled_direction(self, score_EOD: Floats, pairs: Floats) -> Floats:
        """With the whole Hessian ``(diag(p) − p pᵀ) ⊗ x xᵀ``, in the coordinates of :func:`contrasts`."""
        num_maps, num_outputs, width = score_EOD.shape
        free = num_outputs - 1
        basis = contrasts(num_outputs)
        # From the outputs but the last to all of them, whose rows sum to 0, and on to contrasts.
        known = np.moveaxis(from_pairs(pairs.reshape(-1, num_maps * pairs.shape[1]).T, free), 0, -1)
        half = np.tensordot(basis[:-1] - basis[-1], known, axes=(0, 0))
        whole = np.tensordot(basis[:-1] - basis[-1], half, axes=(0, 1)).reshape(free, free, num_maps, -1)
        hessian_EFDFD = from_pairs(whole, width).transpose(2, 0, 3, 1, 4)
        at = np.arange(free)
        hessian_EFDFD[:, at, :, at] += self.penalty_EO[:, :1, None] * _on_slopes(width)
        size = free * width
        right = np.einsum("eod,of->efd", score_EOD, basis).reshape(num_maps, size, 1)
        step = damped_solve(hessian_EFDFD.reshape(num_maps, size, size), right, np.tile(self.data.scale_D, free))
        step_EOD: Floats = np.einsum("efd,of->eod", step.reshape(num_maps, free, width), basis)
        return step_EOD

    def _climbed(self, coef_EOD: Floats) -> Floats:
        """What each map climbs (E,)."""

        def part(rows: slice) -> tuple[Floats]:
            return (self._climbed_by(rows, linear(self.data.x_TD[rows], coef_EOD)),)

        num_maps, num_outputs, _ = coef_EOD.shape
        return summed(len(self.data.x_TD), 8 * num_maps * num_outputs, part)[0] - self._penalty(coef_EOD)

    def _climbed_by(self, rows: slice, eta_TEO: Floats) -> Floats:
        gain_E: Floats = np.einsum("teo,teo->e", self.target_TEO[rows], eta_TEO)
        gain_E -= np.einsum("te,teo->e", self.weight_TE[rows], self.family.log_partition(eta_TEO))
        return gain_E

    def _penalty(self, coef_EOD: Floats) -> Floats:
        squares_EO = (slopes(coef_EOD) ** 2).sum(axis=-1)
        penalty_E: Floats = 0.5 * (self.penalty_EO * squares_EO).sum(axis=-1)
        return penalty_E

    def _halved(self, coef_EOD: Floats, step_EOD: Floats, before_E: Floats) -> Floats:
        """The steps, or a half, a quarter … of one, or nothing of it."""
        size_E = np.ones(len(coef_EOD))
        for _ in range(_HALVINGS):
            climbed_E = self._climbed(coef_EOD + size_E[:, None, None] * step_EOD)
            # A comparison with nan is false: such a step is halved too.
            is_fine_E = climbed_E >= before_E - 1e-13 * np.abs(before_E)
            if is_fine_E.all():
                break
            size_E = np.where(is_fine_E, size_E, size_E / 2)
        else:
            size_E = np.where(is_fine_E, size_E, 0.0)
        return size_E[:, None, None] * step_EOD


def linear(x_TD: Floats, coef_EOD: Floats) -> Floats:
    """η of every map (T, E, O)."""
    num_maps, num_outputs, width = coef_EOD.shape
    return (x_TD @ coef_EOD.reshape(-1, width).T).reshape(len(x_TD), num_maps, num_outputs)


def slopes(coef_EOD: Floats) -> Floats:
    """The same with 0 for the constant: what a penalty is on."""
    without = coef_EOD.copy()
    without[..., -1] = 0.0
    return without


@cache
def contrasts(num_outputs: int) -> Floats:
    """An orthonormal basis of what sums to 0 (O, O − 1): a constant in all η alike changes no probability."""
    basis = np.tril(-np.ones((num_outputs, num_outputs)), -1)[:, :-1]
    basis[np.arange(num_outputs - 1), np.arange(num_outputs - 1)] = np.arange(num_outputs - 1, 0, -1)
    normal: Floats = basis / np.linalg.norm(basis, axis=0)
    return normal


def _on_slopes(width: int) -> Floats:
    return np.diag(np.append(np.ones(width - 1), 0.0))


def _diagonal(width: int) -> Indices:
    """Where pairs are of one with itself."""
    first, second = np.triu_indices(width)
    return np.flatnonzero(first == second)
