"""Adaptive mixtures of local experts, 1991: one gate, experts of any kind, three errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.utils.validation import has_fit_parameter

from moesaic.classic.data import Data
from moesaic.classic.estimator import MixtureEstimator
from moesaic.classic.expert import OwnExperts
from moesaic.classic.fitting import Fit
from moesaic.classic.mixture import Mixture
from moesaic.classic.noise import Noise
from moesaic.classic.objective import ERRORS, Error
from moesaic.classic.settings import need_count, need_one_of
from moesaic.classic.start import Start
from moesaic.classic.targets import Classes, Numbers
from moesaic.classic.tree import Tree
from moesaic.core.errors import ConfigError


class Adaptive(MixtureEstimator):
    """What the regressor and the classifier of 1991 share."""

    _solvers = ("em", "lbfgs", "gradient")
    _linear: str

    @property
    def _error(self) -> Error:
        return ERRORS[self.error]

    def _tree(self) -> Tree:
        return Tree.full((self.num_experts,)) if self.num_experts > 1 else Tree.full(())

    def _start(self, data: Data, noise: Noise) -> Start:
        start = super()._start(data, noise)
        if isinstance(self.expert, str):
            return replace(start, hidden=self.hidden if self.expert == "mlp" else None)
        return replace(start, own=OwnExperts(template=self.expert, family=start.family, seeds=()))

    def _fitted(self, begin: Mixture, data: Data, noise: Noise, random: np.random.RandomState) -> Fit:
        is_blended = self.error == "cooperative" and begin.family.is_gaussian
        return super()._fitted(replace(begin, is_blended=is_blended), data, noise, random)

    def _keep(self, fit: Fit) -> None:
        self.error_curve_ = -np.array(fit.curve)
        super()._keep(fit)

    def _check_settings(self) -> None:
        super()._check_settings()
        need_count("num_experts", self.num_experts)
        need_count("hidden", self.hidden)
        need_one_of("error", self.error, tuple(ERRORS))
        if isinstance(self.expert, str):
            need_one_of("expert", self.expert, (self._linear, "mlp"))
        else:
            self._check_own(self.expert)
        if self.error != "mixture" and self.solver == "em":
            raise ConfigError(
                f"solver='em' needs error='mixture', whose likelihood it climbs; got error={self.error!r}. "
                "Take solver='lbfgs' or 'gradient'."
            )

    def _check_own(self, expert: Any) -> None:
        needed = "predict" if isinstance(self, Numbers) else "predict_proba"
        if isinstance(expert, type) or not hasattr(expert, "fit") or not hasattr(expert, needed):
            raise ConfigError(
                f"expert must be {self._linear!r}, 'mlp' or an estimator with fit and {needed}, got {expert!r}."
            )
        if not has_fit_parameter(expert, "sample_weight"):
            raise ConfigError(
                f"An expert learns from its share of each row: its fit needs sample_weight, which {expert!r} does not "
                "take."
            )
        if self.solver != "em":
            raise ConfigError(
                f"solver={self.solver!r} needs experts with a gradient, got {expert!r}. Take solver='em'."
            )


class AdaptiveMixtureRegressor(Numbers, Adaptive):
    """Regression by local experts and a gate that divides the inputs among them.

    Args:
        num_experts: E.
        expert: ``linear``, ``mlp`` for networks with one hidden layer, or any estimator whose fit takes
            ``sample_weight``, of which each expert gets a copy.
        hidden: units of each network, where ``expert='mlp'``.
        error: what is minimised. ``mixture`` is the negative log-likelihood; ``cooperative`` is the squared residual of
            all experts together, ``competitive`` that of an expert drawn by the gate.
        solver: ``em``; or ``lbfgs`` or ``gradient``, for every error.
        variance: of each expert's Gaussian noise: a number, in the squared units of y, that stays; or estimated,
            ``shared`` by all experts or for each ``expert``. Several outputs have each their own.
        min_variance: the least that it is estimated at, as a share of the variance of y.
        alpha: strength of the penalty on half the squared slopes, as 1 / C in scikit-learn; 0 for none.
        learning_rate: step on the error of a row, on average, where ``solver='gradient'``.
        momentum: share of the last step that is taken again.
        batch_size: rows of a step; None for all.
        standardize: work on inputs and targets of mean 0 and variance 1. What comes out is in your units either way.
        init: ``random`` begins with the inputs cut by soft random planes and a fitted expert for each part; ``small``
            is the beginning of 1991, nearly equal gates and experts.
        max_iter: passes over the data at most.
        tol: the change of the average log-likelihood (or error) at which passes end: in one pass of EM, in ten of
            gradient descent.
        n_init: fits from so many beginnings, of which the best is kept.
        warm_start: go on from the last fit.
        random_state: seed or generator.

    Attributes:
        coef_, intercept_: slopes (E, O, n_features) and intercepts (E, O) of linear experts.
        gate_coef_, gate_intercept_: of the gate's logits, (E, n_features) and (E,); none for a single expert.
        variances_: noise of each expert (E, O).
        experts_: the experts themselves.
        n_iter_: passes that were made.
        converged_: whether the last one changed less than ``tol``.
        loglik_curve_: log-likelihood of a row, on average, before the first pass and after each; less the penalty.
        error_curve_: the error at the same times, in the units that the maths works in.
    Source:
        Jacobs, Jordan, Nowlan and Hinton, Adaptive mixtures of local experts, Neural Computation 3, 1991.
    """

    _link = "gaussian"
    _linear = "linear"

    def __init__(
        self,
        num_experts: int = 4,
        *,
        expert: Any = "linear",
        hidden: int = 8,
        error: str = "mixture",
        solver: str = "em",
        variance: float | str = "expert",
        min_variance: float = 1e-3,
        alpha: float = 0.01,
        learning_rate: float = 0.1,
        momentum: float = 0.0,
        batch_size: int | None = None,
        standardize: bool = True,
        init: str = "random",
        max_iter: int = 200,
        tol: float = 1e-4,
        n_init: int = 1,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.num_experts = num_experts
        self.expert = expert
        self.hidden = hidden
        self.error = error
        self.solver = solver
        self.variance = variance
        self.min_variance = min_variance
        self.alpha = alpha
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.batch_size = batch_size
        self.standardize = standardize
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.warm_start = warm_start
        self.random_state = random_state


class AdaptiveMixtureClassifier(Classes, Adaptive):
    """Classification by local experts and a gate that divides the inputs among them.

    Args:
        num_experts: E.
        expert: ``logistic`` for linear experts with a logistic or softmax output, ``mlp``, or any estimator with
            ``predict_proba`` whose fit takes ``sample_weight``.
        hidden: units of each network, where ``expert='mlp'``.
        error: what is minimised. ``mixture`` is the negative log-likelihood; ``cooperative`` is the squared distance
            between the blend of experts' probabilities and the class as a row with a single 1 (a single output, where
            there are two classes), ``competitive`` that of an expert drawn by the gate.
        solver: ``em``; or ``lbfgs`` or ``gradient``, for every error.
        alpha: strength of the penalty on half the squared slopes, as 1 / C in scikit-learn; 0 for none.
        learning_rate: step on the error of a row, on average, where ``solver='gradient'``.
        momentum: share of the last step that is taken again.
        batch_size: rows of a step; None for all.
        standardize: work on inputs of mean 0 and variance 1. What comes out is in your units either way.
        init: ``random`` begins with the inputs cut by soft random planes and a fitted expert for each part; ``small``
            is the beginning of 1991, nearly equal gates and experts.
        max_iter: passes over the data at most.
        tol: the change of the average log-likelihood (or error) at which passes end: in one pass of EM, in ten of
            gradient descent.
        n_init: fits from so many beginnings, of which the best is kept.
        warm_start: go on from the last fit.
        random_state: seed or generator.

    Attributes:
        classes_: the classes.
        coef_, intercept_: slopes (E, O, n_features) and intercepts (E, O) of logistic experts; O is 1 for two classes.
        gate_coef_, gate_intercept_: of the gate's logits, (E, n_features) and (E,); none for a single expert.
        experts_: the experts themselves.
        n_iter_: passes that were made.
        converged_: whether the last one changed less than ``tol``.
        loglik_curve_: log-likelihood of a row, on average, before the first pass and after each; less the penalty.
        error_curve_: the error at the same times.
    Source:
        Jacobs, Jordan, Nowlan and Hinton, Adaptive mixtures of local experts, Neural Computation 3, 1991.
    """

    _link = "auto"
    _linear = "logistic"
    _allows_labels = False

    def __init__(
        self,
        num_experts: int = 4,
        *,
        expert: Any = "logistic",
        hidden: int = 8,
        error: str = "mixture",
        solver: str = "em",
        alpha: float = 0.01,
        learning_rate: float = 0.1,
        momentum: float = 0.0,
        batch_size: int | None = None,
        standardize: bool = True,
        init: str = "random",
        max_iter: int = 200,
        tol: float = 1e-4,
        n_init: int = 1,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.num_experts = num_experts
        self.expert = expert
        self.hidden = hidden
        self.error = error
        self.solver = solver
        self.alpha = alpha
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.batch_size = batch_size
        self.standardize = standardize
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.warm_start = warm_start
        self.random_state = random_state
