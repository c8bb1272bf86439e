"""Iteratively reweighted least squares: Newton's method for experts of every family, and for gates.

Weighted least squares is the case of a Gaussian, where one step arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from moesaic.classic.data import Data
from moesaic.classic.family import Family
from moesaic.classic.least_squares import damped_solve, weighted_grams
from moesaic.classic.tree import Floats

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
            eta_TEO = linear(self.data.x_TD, coef_EOD)
            step_EOD = self._direction(coef_EOD, eta_TEO)
            if not self.family.is_gaussian:
                step_EOD = self._halved(coef_EOD, eta_TEO, step_EOD)
            coef_EOD = coef_EOD + step_EOD
        return coef_EOD

    def _direction(self, coef_EOD: Floats, eta_TEO: Floats) -> Floats:
        x_TD, weight_TE = self.data.x_TD, self.weight_TE
        mean_TEO = self.family.mean(eta_TEO)
        residual_TEO = self.target_TEO - weight_TE[..., None] * mean_TEO
        score_EOD = (residual_TEO.reshape(len(x_TD), -1).T @ x_TD).reshape(coef_EOD.shape)
        score_EOD -= self.penalty_EO[..., None] * slopes(coef_EOD)
        if self.family.coupled:
            return self._coupled_direction(score_EOD, mean_TEO)
        num_maps, num_outputs, width = coef_EOD.shape
        if self.family.is_gaussian:
            gram_EODD = weighted_grams(x_TD, weight_TE)[:, None]
        else:
            weights = (weight_TE[..., None] * self.family.curvature(mean_TEO)).reshape(len(x_TD), -1)
            gram_EODD = weighted_grams(x_TD, weights).reshape(num_maps, num_outputs, width, width)
        gram_EODD = gram_EODD + self.penalty_EO[..., None, None] * _on_slopes(width)
        return damped_solve(gram_EODD, score_EOD[..., None], self.data.scale_D)[..., 0]

    def _coupled_direction(self, score_EOD: Floats, mean_TEO: Floats) -> Floats:
        """With the whole Hessian ``(diag(p) − p pᵀ) ⊗ x xᵀ``, in the coordinates of :func:`contrasts`."""
        num_maps, num_outputs, width = score_EOD.shape
        basis = contrasts(num_outputs)
        free = num_outputs - 1
        first, second = np.triu_indices(free)
        products = basis[:, first] * basis[:, second]

        def pairs(rows: slice) -> Floats:
            across = mean_TEO[rows] @ basis
            each = mean_TEO[rows] @ products - across[..., first] * across[..., second]
            each *= self.weight_TE[rows, :, None]
            return each.reshape(len(each), -1)

        blocks = weighted_grams(self.data.x_TD, pairs).reshape(num_maps, len(first), width, width)
        blocks[:, first == second] += self.penalty_EO[:, :1, None, None] * _on_slopes(width)
        hessian = np.empty((num_maps, free, width, free, width))
        hessian[:, first, :, second, :] = np.moveaxis(blocks, 1, 0)
        hessian[:, second, :, first, :] = np.moveaxis(blocks, 1, 0)
        size = free * width
        right = np.einsum("eod,of->efd", score_EOD, basis).reshape(num_maps, size, 1)
        step = damped_solve(hessian.reshape(num_maps, size, size), right, np.tile(self.data.scale_D, free))
        step_EOD: Floats = np.einsum("efd,of->eod", step.reshape(num_maps, free, width), basis)
        return step_EOD

    def _halved(self, coef_EOD: Floats, eta_TEO: Floats, step_EOD: Floats) -> Floats:
        """The steps, or a half, a quarter … of one, or nothing of it."""
        change_TEO = linear(self.data.x_TD, step_EOD)

        def climbed(size_E: Floats) -> Floats:
            at_TEO = eta_TEO + size_E[:, None] * change_TEO
            gain_E: Floats = np.einsum("teo,teo->e", self.target_TEO, at_TEO)
            gain_E -= np.einsum("te,teo->e", self.weight_TE, self.family.log_partition(at_TEO))
            squares_EO = (slopes(coef_EOD + size_E[:, None, None] * step_EOD) ** 2).sum(axis=-1)
            gain_E -= 0.5 * (self.penalty_EO * squares_EO).sum(axis=-1)
            return gain_E

        size_E = np.ones(len(coef_EOD))
        before_E = climbed(np.zeros_like(size_E))
        for _ in range(_HALVINGS):
            # A comparison with nan is false: such a step is halved too.
            is_fine_E = climbed(size_E) >= before_E - 1e-13 * np.abs(before_E)
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
