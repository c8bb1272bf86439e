"""What all four estimators share: scikit-learn's conventions around a :class:`~moesaic.classic.mixture.Mixture`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from moesaic.classic.cores import all_cores
from moesaic.classic.data import Data, Frame
from moesaic.classic.em import EM
from moesaic.classic.family import Family
from moesaic.classic.fitting import Fit, climb
from moesaic.classic.gate import by_least_squares, by_newton
from moesaic.classic.gradient import Gradient
from moesaic.classic.mixture import Mixture
from moesaic.classic.noise import Noise, NoiseKind
from moesaic.classic.objective import Error, mixture
from moesaic.classic.settings import need_count, need_number, need_one_of
from moesaic.classic.start import Start
from moesaic.classic.tree import Floats, Indices, Tree
from moesaic.core.errors import ConfigError

GATES = {"em": by_newton, "least-squares": by_least_squares}


class MixtureEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Fit a mixture, ask it: everything but what targets are and what a family of models has of its own."""

    _solvers: tuple[str, ...]

    @property
    def _error(self) -> Error:
        return mixture

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fit to rows.

        Args:
            X: inputs, (n_samples, n_features).
            y: targets, (n_samples,), or (n_samples, n_outputs) where several are allowed.
            sample_weight: weight of each row, (n_samples,); 2 is as if it came twice.
        Raises:
            ConfigError: if a setting cannot be used, or data do not fit the setting.
        """
        self._check_settings()
        X, y_TO = self._validated(X, y)
        weight_T = weights_of(sample_weight, X)
        kept = weight_T > 0
        X, y_TO, weight_T = X[kept], y_TO[kept], weight_T[kept]
        is_warm = self.warm_start and hasattr(self, "mixture_")
        random = check_random_state(self.random_state)
        if is_warm:
            self._check_warm(X.shape[1], y_TO.shape[1])
        else:
            self.frame_ = self._framed(X, y_TO, weight_T)
        data = Data(x_TD=self.frame_.inputs(X), y_TO=self.frame_.targets(y_TO), weight_T=weight_T)
        noise = self._noise(data)
        best: Fit | None = None
        with all_cores():
            for _ in range(1 if is_warm else self.n_init):
                begin = self.mixture_ if is_warm else self._start(data, noise)(data, random, self.alpha)
                fit = self._fitted(begin, data, noise, random)
                best = fit if best is None or fit.best > best.best else best
        assert best is not None
        self._keep(best)
        return self

    def gate(self, X: Any) -> Floats:
        """How far each expert is trusted with each row, by the inputs alone (n_samples, E)."""
        x_TD = self._inputs(X)
        shares: Floats = np.exp(self.mixture_.log_gate(x_TD))
        return shares

    def transform(self, X: Any) -> Floats:
        """The same as :meth:`gate`, as features for what comes next in a pipeline."""
        return self.gate(X)

    def apply(self, X: Any) -> Indices:
        """The expert that each row's gates trust most (n_samples,)."""
        chosen: Indices = self.gate(X).argmax(axis=1)
        return chosen

    def responsibilities(self, X: Any, y: Any) -> Floats:
        """How likely each expert is to have made each row's target (n_samples, E)."""
        x_TD, y_TO = self._rows(X, y)
        return self.mixture_.posterior(x_TD, y_TO)[0]

    def log_density(self, X: Any, y: Any) -> Floats:
        """Log-density of each row's target, or its log-probability where it is a class or a count (n_samples,)."""
        x_TD, y_TO = self._rows(X, y)
        return self.mixture_.posterior(x_TD, y_TO)[1] - self._log_volume

    def bic(self, X: Any, y: Any) -> float:
        """Bayesian information criterion on these rows; lower is better."""
        loglik_T = self.log_density(X, y)
        return float(self._num_params() * np.log(len(loglik_T)) - 2 * loglik_T.sum())

    def aic(self, X: Any, y: Any) -> float:
        """Akaike information criterion on these rows; lower is better."""
        return float(2 * self._num_params() - 2 * self.log_density(X, y).sum())

    def sample(self, X: Any, random_state: int | np.random.RandomState | None = None) -> tuple[NDArray[Any], Indices]:
        """Draw a target for each row, as the model thinks that targets come about.

        Args:
            X: inputs.
            random_state: seed or generator.
        Returns:
            The targets, and the expert that each was drawn from.
        """
        x_TD = self._inputs(X)
        random = check_random_state(random_state)
        log_gate_TE, mean_TEO, dispersion_EO = self.mixture_.components(x_TD)
        passed_TE = random.uniform(size=(len(x_TD), 1)) > np.exp(log_gate_TE).cumsum(axis=1)
        expert_T = np.minimum(passed_TE.sum(axis=1), mean_TEO.shape[1] - 1)
        mean_TO = np.take_along_axis(mean_TEO, expert_T[:, None, None], axis=1)[:, 0]
        drawn_TO = self.mixture_.family.draw(random, mean_TO, dispersion_EO[expert_T])
        return self._decoded(self.frame_.targets_back(drawn_TO)), expert_T

    @property
    def num_experts_(self) -> int:
        """E."""
        return self.mixture_.tree.num_experts

    @property
    def gate_coef_(self) -> Floats:
        """Slopes of the branches' logits, in the user's units (A, n_features)."""
        return self.frame_.maps_back(self.mixture_.gate_AD[:, None], of_targets=False)[0][:, 0]

    @property
    def gate_intercept_(self) -> Floats:
        """Intercepts of the branches' logits (A,)."""
        return self.frame_.maps_back(self.mixture_.gate_AD[:, None], of_targets=False)[1][:, 0]

    @property
    def coef_(self) -> Floats:
        """Slopes of linear experts, in the user's units (E, O, n_features)."""
        return self._expert_maps()[0]

    @property
    def intercept_(self) -> Floats:
        """Intercepts of linear experts (E, O)."""
        return self._expert_maps()[1]

    @property
    def variances_(self) -> Floats:
        """The noise of each Gaussian expert, in the user's units (E, O)."""
        if not self.mixture_.family.is_gaussian:
            raise AttributeError(f"variances_ is for Gaussian targets, and these are {self.mixture_.family.name}.")
        variances: Floats = self.mixture_.dispersion_EO * self.frame_.y_scale_O**2
        return variances

    @property
    def experts_(self) -> Any:
        """The experts themselves; estimators of the user's own are in their ``estimators``."""
        return self.mixture_.experts

    @property
    def _n_features_out(self) -> int:
        return self.num_experts_

    @property
    def _log_volume(self) -> float:
        """How much denser targets lie in the frame than in the user's units."""
        return float(np.log(self.frame_.y_scale_O).sum())

    def _expert_maps(self) -> tuple[Floats, Floats]:
        coef_EOD = getattr(self.mixture_.experts, "coef_EOD", None)
        if coef_EOD is None:
            raise AttributeError("coef_ and intercept_ are for linear experts; experts_ has these as they are.")
        return self.frame_.maps_back(coef_EOD, of_targets=self.mixture_.family.is_gaussian)

    def _num_params(self) -> int:
        tree, experts = self.mixture_.tree, self.mixture_.experts
        arrays = getattr(experts, "arrays", None)
        if arrays is None:
            raise ConfigError(
                "An information criterion needs the number of parameters, which such experts do not tell."
            )
        gates = (tree.num_branches - len(tree.start_G)) * self.mixture_.gate_AD.shape[1]
        # A constant in all η of a multinomial changes nothing.
        free = 1 - self.mixture_.family.coupled / arrays[-1].shape[1]
        own = sum(array.size for array in arrays[:-1]) + round(arrays[-1].size * free)
        num_outputs = self.mixture_.dispersion_EO.shape[1]
        noise = {"fixed": 0, "shared": num_outputs, "expert": tree.num_experts * num_outputs}
        return int(gates + own + noise[self._noise_kind(self.mixture_.family)])

    def _inputs(self, X: Any) -> Floats:
        check_is_fitted(self, "mixture_")
        return self.frame_.inputs(validate_data(self, X, dtype=np.float64, reset=False))

    def _rows(self, X: Any, y: Any) -> tuple[Floats, Floats]:
        x_TD = self._inputs(X)
        return x_TD, self.frame_.targets(self._given(y, len(x_TD)))

    def _framed(self, X: Floats, y_TO: Floats, weight_T: Floats) -> Frame:
        moves_targets = self.standardize and self._family().is_gaussian
        return Frame.of(X, y_TO, weight_T, moves_inputs=self.standardize, moves_targets=moves_targets)

    def _noise(self, data: Data) -> Noise:
        kind = self._noise_kind(self._family())
        return Noise(kind=kind, floor_O=self.min_variance * spread(data))

    def _noise_kind(self, family: Family) -> NoiseKind:
        if not family.is_gaussian or not isinstance(self.variance, str):
            return "fixed"
        return "shared" if self.variance == "shared" else "expert"

    def _start(self, data: Data, noise: Noise) -> Start:
        family = self._family()
        variance_O = spread(data)
        if not family.is_gaussian:
            variance_O = np.ones_like(variance_O)
        elif noise.kind == "fixed":
            variance_O = self.variance / self.frame_.y_scale_O**2
        return Start(kind=self.init, tree=self._tree(), family=family, noise=noise, variance_O=variance_O)

    def _fitted(self, begin: Mixture, data: Data, noise: Noise, random: np.random.RandomState) -> Fit:
        return self._climbed(begin, data, noise, random)

    def _climbed(self, begin: Mixture, data: Data, noise: Noise, random: np.random.RandomState) -> Fit:
        """By the solver that was asked for."""
        measure = None if self._error is mixture else lambda seen: loglik(seen, data)
        if self.solver in GATES:
            em = EM(noise=noise, penalty=self.alpha, gates=GATES[self.solver])
            return climb(em.passes(begin, data), max_iter=self.max_iter, tol=self.tol)
        gradient = Gradient(
            error=self._error,
            noise=noise,
            penalty=self.alpha,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            batch_size=self.batch_size,
        )
        if self.solver == "lbfgs":
            passes, has_converged = gradient.lbfgs(begin, data, max_iter=self.max_iter, tol=self.tol)
            fit = climb(passes, max_iter=self.max_iter, tol=-1.0, measure=measure)
            return replace(fit, has_converged=has_converged)
        steps = gradient.passes(begin, data, random)
        return climb(steps, max_iter=self.max_iter, tol=self.tol, over=10, measure=measure)

    def _check_warm(self, *wanted: int) -> None:
        """See that what is there is of the form that was asked for; a tree that grew by itself is."""
        is_own = getattr(self, "max_experts", None) is not None or getattr(self, "prune", False)
        there = self.mixture_.tree
        asked = there if is_own else self._tree()
        sizes = (self.frame_.shift_D.size, self.frame_.y_shift_O.size)
        if there != asked or sizes != wanted:
            raise ConfigError(
                f"warm_start goes on with what is there, {there.num_experts} experts for {sizes[0]} inputs and "
                f"{sizes[1]} outputs; asked for were {asked.num_experts} experts, {wanted[0]} inputs and {wanted[1]} "
                "outputs. Set warm_start=False to begin anew."
            )

    def _keep(self, fit: Fit) -> None:
        self.mixture_ = fit.mixture
        self.n_iter_ = fit.num_passes
        self.converged_ = fit.has_converged
        self.loglik_curve_ = np.array(fit.loglik_curve or fit.curve) - self._log_volume
        if not fit.has_converged:
            warnings.warn(
                f"{type(self).__name__} still changed by more than tol={self.tol:g} after max_iter={self.max_iter} "
                "passes. Raise one of them.",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _tree(self) -> Tree:
        raise TypeError(f"{type(self).__name__} has no tree.")

    def _check_settings(self) -> None:
        need_one_of("solver", self.solver, self._solvers)
        need_one_of("init", self.init, ("random", "small"))
        need_number("alpha", self.alpha, least=0)
        need_number("learning_rate", self.learning_rate, above=0)
        need_number("momentum", self.momentum, least=0)
        need_number("tol", self.tol, least=0)
        need_count("max_iter", self.max_iter)
        need_count("n_init", self.n_init)
        if self.batch_size is not None:
            need_count("batch_size", self.batch_size)


def weights_of(sample_weight: Any, X: Floats) -> Floats:
    """Weights of the rows, checked.

    Raises:
        ConfigError: if one is negative, or none is above 0.
    """
    weight_T: Floats = _check_sample_weight(sample_weight, X, dtype=np.float64)
    if (weight_T < 0).any():
        raise ConfigError(f"sample_weight must not be negative, got {weight_T.min():g}.")
    if not weight_T.any():
        raise ConfigError("sample_weight needs a row whose weight is not zero, got zeros alone.")
    return weight_T


def spread(data: Data) -> Floats:
    """Variance of each target; 1 for one that does not vary."""
    mean_O = data.weight_T @ data.y_TO / data.total
    variance_O = data.weight_T @ (data.y_TO - mean_O) ** 2 / data.total
    is_spread = variance_O > 1e-20 * mean_O**2
    return np.where(is_spread, variance_O, 1.0)


def loglik(seen: Mixture, data: Data) -> float:
    """Log-likelihood of a row, on average, in the frame."""
    return float(data.weight_T @ seen.posterior(data.x_TD, data.y_TO)[1]) / data.total
