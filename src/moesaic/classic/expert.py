"""Experts: linear maps, small networks, or anybody's estimators, all working side by side on the same rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from scipy.optimize import minimize

from moesaic.classic.data import Data
from moesaic.classic.family import Family
from moesaic.classic.irls import LinearFit, linear, slopes
from moesaic.classic.tree import Floats, Indices


class Experts(Protocol):
    """E functions from inputs to a natural parameter."""

    @property
    def wants_all_rows(self) -> bool:
        """Whether to be asked about a part of the rows at a time, in several threads, is not for them."""
        ...

    def eta(self, x_TD: Floats) -> Floats:
        """What each says about each row (T, E, O)."""
        ...

    def fitted(self, data: Data, share_TE: Floats, family: Family, dispersion_EO: Floats, penalty: float) -> Experts:
        """Fitted better to rows weighted by each expert's share of them: the M-step."""
        ...

    def squared_slopes(self) -> float:
        """What a penalty is on: the sum of squares of all numbers but the constants' weights."""
        ...

    def take(self, expert_E: Indices) -> Experts:
        """Some of them, in that order; one may come twice."""
        ...


class Differentiable(Experts, Protocol):
    """Experts with numbers that a gradient can move."""

    @property
    def arrays(self) -> tuple[Floats, ...]:
        """Their numbers; the first axis counts experts, the last one's end is the constant's weight."""
        ...

    def with_arrays(self, arrays: tuple[Floats, ...]) -> Differentiable:
        """The same with other numbers."""
        ...

    def backward(self, x_TD: Floats, d_eta_TEO: Floats) -> tuple[Floats, ...]:
        """From the derivative by η to that by the numbers."""
        ...


@dataclass(frozen=True, slots=True)
class LinearExperts:
    """Generalised linear models: η = U x.

    Attributes:
        coef_EOD: a map for each expert, its last column for the constant.
    """

    coef_EOD: Floats

    @property
    def wants_all_rows(self) -> bool:
        """No."""
        return False

    def eta(self, x_TD: Floats) -> Floats:
        """U x."""
        return linear(x_TD, self.coef_EOD)

    def fitted(
        self, data: Data, share_TE: Floats, family: Family, dispersion_EO: Floats, penalty: float
    ) -> LinearExperts:
        """One step of IRLS, which for a Gaussian is the whole way."""
        fit = LinearFit(
            data=data,
            family=family,
            target_TEO=share_TE[..., None] * data.y_TO[:, None, :],
            weight_TE=share_TE,
            penalty_EO=penalty * dispersion_EO,
        )
        return LinearExperts(fit.newton(self.coef_EOD))

    def squared_slopes(self) -> float:
        """Of U without its last column."""
        return float((slopes(self.coef_EOD) ** 2).sum())

    def take(self, expert_E: Indices) -> LinearExperts:
        """Some of them."""
        return LinearExperts(self.coef_EOD[expert_E])

    @property
    def arrays(self) -> tuple[Floats, ...]:
        """U."""
        return (self.coef_EOD,)

    def with_arrays(self, arrays: tuple[Floats, ...]) -> LinearExperts:
        """The same with another U."""
        return LinearExperts(*arrays)

    def backward(self, x_TD: Floats, d_eta_TEO: Floats) -> tuple[Floats, ...]:
        """The derivative by U."""
        flat = d_eta_TEO.reshape(len(x_TD), -1).T @ x_TD
        return (flat.reshape(self.coef_EOD.shape),)


@dataclass(frozen=True, slots=True)
class NetworkExperts:
    """Networks with one hidden layer of tanh units.

    Attributes:
        hidden_EFD: from inputs to hidden units.
        output_EOF: from hidden units and a constant to η, so that its last dimension is one more than F.
    """

    hidden_EFD: Floats
    output_EOF: Floats

    @property
    def wants_all_rows(self) -> bool:
        """No."""
        return False

    def eta(self, x_TD: Floats) -> Floats:
        """What comes out."""
        eta: Floats = np.einsum("tef,eof->teo", self._hidden(x_TD), self.output_EOF, optimize=True)
        return eta

    def _hidden(self, x_TD: Floats) -> Floats:
        active_TEF = np.tanh(linear(x_TD, self.hidden_EFD))
        return np.concatenate([active_TEF, np.ones((*active_TEF.shape[:2], 1))], axis=-1)

    def fitted(
        self, data: Data, share_TE: Floats, family: Family, dispersion_EO: Floats, penalty: float
    ) -> NetworkExperts:
        """Some steps of L-BFGS, which never end lower than they began."""

        def descent(flat: Floats) -> tuple[float, Floats]:
            experts = self.with_arrays(unflattened(flat, self.arrays))
            eta_TEO = experts.eta(data.x_TD)
            value = -float((share_TE * family.loglik(data.y_TO, eta_TEO, dispersion_EO)).sum())
            score_TEO = family.score(data.y_TO, family.mean(eta_TEO), dispersion_EO)
            gradient = experts.backward(data.x_TD, -share_TE[..., None] * score_TEO)
            decayed = [slopes(array) for array in experts.arrays]
            value += 0.5 * penalty * sum(float((array**2).sum()) for array in decayed)
            both = [one + penalty * other for one, other in zip(gradient, decayed, strict=True)]
            return value / data.total, flattened(both) / data.total

        found = minimize(descent, flattened(self.arrays), jac=True, method="L-BFGS-B", options={"maxiter": 10})
        return self.with_arrays(unflattened(found.x, self.arrays))

    def squared_slopes(self) -> float:
        """Of both layers."""
        return sum(float((slopes(array) ** 2).sum()) for array in self.arrays)

    def take(self, expert_E: Indices) -> NetworkExperts:
        """Some of them."""
        return NetworkExperts(self.hidden_EFD[expert_E], self.output_EOF[expert_E])

    @property
    def arrays(self) -> tuple[Floats, ...]:
        """Both layers."""
        return self.hidden_EFD, self.output_EOF

    def with_arrays(self, arrays: tuple[Floats, ...]) -> NetworkExperts:
        """The same with other layers."""
        return NetworkExperts(*arrays)

    def backward(self, x_TD: Floats, d_eta_TEO: Floats) -> tuple[Floats, ...]:
        """The derivative by both layers."""
        active_TEF = self._hidden(x_TD)
        d_output = np.einsum("teo,tef->eof", d_eta_TEO, active_TEF, optimize=True)
        active_TEF = active_TEF[..., :-1]
        d_hidden_TEF = np.einsum("teo,eof->tef", d_eta_TEO, self.output_EOF[..., :-1], optimize=True)
        d_hidden_TEF *= 1 - active_TEF**2
        flat = d_hidden_TEF.reshape(len(x_TD), -1).T @ x_TD
        return flat.reshape(self.hidden_EFD.shape), d_output


@dataclass(frozen=True, slots=True)
class OwnExperts:
    """Anybody's estimators with scikit-learn's ``fit(X, y, sample_weight)`` and ``predict`` or ``predict_proba``.

    Attributes:
        template: an estimator that is cloned for each expert and never fitted itself.
        family: what its predictions are the mean of.
        seeds: a random state for each expert, for estimators that take one.
        estimators: the fitted ones; none before the first M-step.
        num_outputs: O.
    """

    template: Any
    family: Family
    seeds: tuple[int, ...]
    estimators: tuple[Any, ...] = ()
    num_outputs: int = 1

    @property
    def wants_all_rows(self) -> bool:
        """Nobody knows what threads do to them."""
        return True

    def eta(self, x_TD: Floats) -> Floats:
        """The η of their predictions."""
        each = [self.family.link(self._mean(one, x_TD[:, :-1])) for one in self.estimators]
        return np.stack(each, axis=1)

    def fitted(self, data: Data, share_TE: Floats, family: Family, dispersion_EO: Floats, penalty: float) -> OwnExperts:
        """Each fitted anew with its shares as weights; one that has next to nothing stays as it is."""
        from sklearn.base import clone

        fitted = []
        for number, share_T in enumerate(share_TE.T):
            if self.estimators and share_T.sum() < 1e-8 * data.total:
                fitted.append(self.estimators[number])
                continue
            one = clone(self.template)
            if "random_state" in one.get_params():
                one.set_params(random_state=self.seeds[number])
            # Weights below this are none, and some estimators divide by their sum.
            kept = share_T > 1e-12 * share_T.max()
            one.fit(data.x_TD[kept, :-1], self._labels(data.y_TO[kept]), sample_weight=share_T[kept])
            fitted.append(one)
        return replace(self, estimators=tuple(fitted), num_outputs=data.y_TO.shape[1])

    def _labels(self, y_TO: Floats) -> Floats:
        if self.family.coupled:
            labels: Floats = y_TO.argmax(axis=1).astype(np.float64)
            return labels
        return y_TO[:, 0] if y_TO.shape[1] == 1 else y_TO

    def _mean(self, estimator: Any, x_TD: Floats) -> Floats:
        if self.family.is_gaussian:
            return np.asarray(estimator.predict(x_TD), dtype=np.float64).reshape(len(x_TD), -1)
        share = estimator.predict_proba(x_TD)
        known = np.asarray(estimator.classes_, dtype=np.intp)
        mean = np.zeros((len(x_TD), max(2, self.num_outputs)))
        mean[:, known] = share
        return mean if self.family.coupled else mean[:, 1:]

    def squared_slopes(self) -> float:
        """Nothing: their own settings penalise them."""
        return 0.0

    def take(self, expert_E: Indices) -> OwnExperts:
        """Some of them."""
        return replace(
            self,
            seeds=tuple(self.seeds[one] for one in expert_E),
            estimators=tuple(self.estimators[one] for one in expert_E),
        )


def flattened(arrays: Any) -> Floats:
    """All numbers in one row."""
    return np.concatenate([np.ravel(array) for array in arrays])


def unflattened(flat: Floats, like: tuple[Floats, ...]) -> tuple[Floats, ...]:
    """Undo :func:`flattened`."""
    ends = np.cumsum([array.size for array in like])
    parts = np.split(flat, ends[:-1])
    return tuple(part.reshape(array.shape) for part, array in zip(parts, like, strict=True))
