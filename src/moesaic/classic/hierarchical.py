"""Hierarchical mixtures of experts, 1994: a tree of gates over linear models, fitted by EM or row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.utils import check_random_state

from moesaic.classic.data import Data
from moesaic.classic.em import EM
from moesaic.classic.estimator import GATES, MixtureEstimator, weights_of
from moesaic.classic.fitting import Fit
from moesaic.classic.gate import by_newton
from moesaic.classic.grow import Gardener
from moesaic.classic.mixture import Mixture
from moesaic.classic.noise import Noise
from moesaic.classic.online import Online
from moesaic.classic.settings import need_count, need_one_of, need_share
from moesaic.classic.targets import Classes, Numbers
from moesaic.classic.tree import Tree
from moesaic.core.errors import ConfigError


class Hierarchical(MixtureEstimator):
    """What the regressor and the classifier of 1994 share."""

    _solvers = (*GATES, "lbfgs", "gradient")
    _links: tuple[str, ...]
    _online: Online | None = None

    @property
    def _link(self) -> str:
        return str(self.link)

    def _learned(self, X: Any, y: Any, sample_weight: Any, **known: Any) -> Any:
        is_first = not hasattr(self, "mixture_")
        if is_first:
            self._check_settings()
        X, y_TO = self._validated(X, y, is_first=is_first, **known)
        weight_T = weights_of(sample_weight, X)
        if is_first:
            self.frame_ = self._framed(X, y_TO, weight_T)
        data = Data(x_TD=self.frame_.inputs(X), y_TO=self.frame_.targets(y_TO), weight_T=weight_T)
        if self._online is None:
            noise = self._noise(data)
            random = check_random_state(self.random_state)
            begin = self._start(data, noise)(data, random, self.alpha) if is_first else self.mixture_
            self._online = Online(mixture=begin, noise=noise, decay=self.decay)
        self._online.learn(data)
        self.mixture_ = self._online.now()
        return self

    def _tree(self) -> Tree:
        return Tree.full(self.branching)

    def _fitted(self, begin: Mixture, data: Data, noise: Noise, random: np.random.RandomState) -> Fit:
        if self.max_experts is None and not self.prune:
            return super()._fitted(begin, data, noise, random)
        begin, history = self._grown(begin, data, noise, random)
        return replace(super()._fitted(begin, data, noise, random), held_out=tuple(history))

    def _grown(
        self, begin: Mixture, data: Data, noise: Noise, random: np.random.RandomState
    ) -> tuple[Mixture, list[tuple[int, float]]]:
        """Another tree, found on one part of the rows by what it is worth on the other; and the trees on the way."""
        # The same rows for every beginning, or their trees could not be compared.
        order = np.random.RandomState(0).permutation(len(data.x_TD))
        count = round(self.validation_fraction * len(order))
        if not 0 < count < len(order):
            raise ConfigError(
                f"A tree of its own size needs rows to fit and rows to hold out; validation_fraction="
                f"{self.validation_fraction:g} of {len(order)} rows leaves none of one kind. Give more rows."
            )
        gardener = Gardener(
            em=EM(noise=noise, penalty=self.alpha, gates=GATES.get(self.solver, by_newton)),
            train=data.rows(order[count:]),
            held_out=data.rows(order[:count]),
            random=random,
        )
        mixture = super()._fitted(begin, gardener.train, noise, random).mixture
        if self.max_experts is not None:
            mixture = gardener.grown(mixture, self.max_experts)
        if self.prune:
            mixture = gardener.pruned(mixture)
        return mixture, gardener.history

    def _keep(self, fit: Fit) -> None:
        # A batch fit ends what was learned on-line.
        self._online = None
        if fit.held_out:
            self.held_out_curve_ = np.array([(count, value - self._log_volume) for count, value in fit.held_out])
        super()._keep(fit)

    def _check_settings(self) -> None:
        super()._check_settings()
        need_one_of("link", self.link, self._links)
        if isinstance(self.branching, str) or not all(
            isinstance(count, int | np.integer) and count >= 2 for count in self.branching
        ):
            raise ConfigError(
                f"branching must have a whole number of at least 2 for each level, as in (2, 2, 2); got "
                f"{self.branching!r}. Leave it empty for one expert."
            )
        need_share("validation_fraction", self.validation_fraction)
        need_share("decay", self.decay)
        if self.max_experts is not None:
            need_count("max_experts", self.max_experts)


class HierarchicalMixtureRegressor(Numbers, Hierarchical):
    """Regression by a tree of soft decisions over generalised linear models.

    Args:
        branching: children of a node, level by level: ``(2, 2, 2)`` is a binary tree of 8 experts, ``(8,)`` is flat,
            ``()`` is one expert.
        link: ``gaussian``, or ``poisson`` for counts, whose logarithm is linear.
        solver: ``em``, the paper's algorithm 1, which never lowers the likelihood; ``least-squares``, its algorithm 2,
            which has simpler gates; ``lbfgs`` or ``gradient``.
        variance: of each expert's Gaussian noise: a number, in the squared units of y, that stays; or estimated,
            ``shared`` by all experts or for each ``expert``. Several outputs have each their own.
        min_variance: the least that it is estimated at, as a share of the variance of y.
        alpha: strength of the penalty on half the squared slopes, as 1 / C in scikit-learn; 0 for none.
        max_experts: let the tree grow from ``branching`` to at most so many, while held-out likelihood clearly rises.
        prune: take experts off, while held-out likelihood does not fall.
        validation_fraction: of rows to hold out while the tree changes. It is fitted to all rows afterwards.
        learning_rate: step on the error of a row, on average, where ``solver='gradient'``.
        momentum: share of the last step that is taken again.
        batch_size: rows of a step; None for all.
        decay: what each row of :meth:`partial_fit` leaves of the weight of those before it, at first; every 1000 rows
            it goes 0.6 of the way to 1.
        standardize: work on inputs and targets of mean 0 and variance 1. What comes out is in your units either way.
        init: ``random`` begins with the inputs cut by soft random planes and a fitted expert for each part; ``small``
            with nearly equal gates and experts.
        max_iter: passes over the data at most.
        tol: the change of the average log-likelihood at which passes end: in one pass of EM, in ten of gradient
            descent.
        n_init: fits from so many beginnings, of which the best is kept.
        warm_start: go on from the last fit.
        random_state: seed or generator.

    Attributes:
        coef_, intercept_: slopes (E, O, n_features) and intercepts (E, O) of the experts.
        gate_coef_, gate_intercept_: of the logits of the tree's branches, (A, n_features) and (A,), level by level.
        variances_: noise of each expert (E, O).
        mixture_: the model as a value, with its ``tree``.
        n_iter_: passes that were made.
        converged_: whether the last one changed less than ``tol``.
        loglik_curve_: log-likelihood of a row, on average, before the first pass and after each; less the penalty.
        held_out_curve_: (number of experts, held-out log-likelihood of a row) of every tree on the way, if it changed.
    Source:
        Jordan and Jacobs, Hierarchical mixtures of experts and the EM algorithm, Neural Computation 6, 1994.
    """

    _links = ("gaussian", "poisson")

    def __init__(
        self,
        branching: tuple[int, ...] = (2, 2, 2),
        *,
        link: str = "gaussian",
        solver: str = "em",
        variance: float | str = "expert",
        min_variance: float = 1e-3,
        alpha: float = 0.01,
        max_experts: int | None = None,
        prune: bool = False,
        validation_fraction: float = 0.2,
        learning_rate: float = 0.1,
        momentum: float = 0.0,
        batch_size: int | None = None,
        decay: float = 0.99,
        standardize: bool = True,
        init: str = "random",
        max_iter: int = 200,
        tol: float = 1e-4,
        n_init: int = 1,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.branching = branching
        self.link = link
        self.solver = solver
        self.variance = variance
        self.min_variance = min_variance
        self.alpha = alpha
        self.max_experts = max_experts
        self.prune = prune
        self.validation_fraction = validation_fraction
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.batch_size = batch_size
        self.decay = decay
        self.standardize = standardize
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.warm_start = warm_start
        self.random_state = random_state

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Learn from rows one after the other, as they come: recursive least squares that forgets what is long ago.

        The first call sees how inputs are scaled and where gates begin: give it some rows, or scale them yourself and
        set ``standardize=False``.

        Args:
            X: inputs.
            y: targets.
            sample_weight: weight of each row.
        """
        return self._learned(X, y, sample_weight)


class HierarchicalMixtureClassifier(Classes, Hierarchical):
    """Classification by a tree of soft decisions over logistic models.

    Args:
        branching: children of a node, level by level: ``(2, 2, 2)`` is a binary tree of 8 experts, ``(8,)`` is flat,
            ``()`` is one expert.
        link: ``bernoulli`` for two classes, or for several labels at once in columns of 0 and 1; ``multinomial`` for
            two classes or more; ``auto`` for the one that fits.
        solver: ``em``, the paper's algorithm 1, which never lowers the likelihood; ``least-squares``, its algorithm 2,
            which has simpler gates; ``lbfgs`` or ``gradient``.
        alpha: strength of the penalty on half the squared slopes, as 1 / C in scikit-learn; 0 for none.
        max_experts: let the tree grow from ``branching`` to at most so many, while held-out likelihood clearly rises.
        prune: take experts off, while held-out likelihood does not fall.
        validation_fraction: of rows to hold out while the tree changes. It is fitted to all rows afterwards.
        learning_rate: step on the error of a row, on average, where ``solver='gradient'``.
        momentum: share of the last step that is taken again.
        batch_size: rows of a step; None for all.
        decay: what each row of :meth:`partial_fit` leaves of the weight of those before it, at first; every 1000 rows
            it goes 0.6 of the way to 1.
        standardize: work on inputs of mean 0 and variance 1. What comes out is in your units either way.
        init: ``random`` begins with the inputs cut by soft random planes and a fitted expert for each part; ``small``
            with nearly equal gates and experts.
        max_iter: passes over the data at most.
        tol: the change of the average log-likelihood at which passes end: in one pass of EM, in ten of gradient
            descent.
        n_init: fits from so many beginnings, of which the best is kept.
        warm_start: go on from the last fit.
        random_state: seed or generator.

    Attributes:
        classes_: the classes, or the numbers of the labels.
        coef_, intercept_: slopes (E, O, n_features) and intercepts (E, O) of the experts; O is 1 for two classes.
        gate_coef_, gate_intercept_: of the logits of the tree's branches, (A, n_features) and (A,), level by level.
        mixture_: the model as a value, with its ``tree``.
        n_iter_: passes that were made.
        converged_: whether the last one changed less than ``tol``.
        loglik_curve_: log-likelihood of a row, on average, before the first pass and after each; less the penalty.
        held_out_curve_: (number of experts, held-out log-likelihood of a row) of every tree on the way, if it changed.
    Source:
        Jordan and Jacobs, Hierarchical mixtures of experts and the EM algorithm, Neural Computation 6, 1994.
    """

    _links = ("auto", "bernoulli", "multinomial")
    _allows_labels = True

    def __init__(
        self,
        branching: tuple[int, ...] = (2, 2, 2),
        *,
        link: str = "auto",
        solver: str = "em",
        alpha: float = 0.01,
        max_experts: int | None = None,
        prune: bool = False,
        validation_fraction: float = 0.2,
        learning_rate: float = 0.1,
        momentum: float = 0.0,
        batch_size: int | None = None,
        decay: float = 0.99,
        standardize: bool = True,
        init: str = "random",
        max_iter: int = 200,
        tol: float = 1e-4,
        n_init: int = 1,
        warm_start: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ):
        self.branching = branching
        self.link = link
        self.solver = solver
        self.alpha = alpha
        self.max_experts = max_experts
        self.prune = prune
        self.validation_fraction = validation_fraction
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.batch_size = batch_size
        self.decay = decay
        self.standardize = standardize
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.n_init = n_init
        self.warm_start = warm_start
        self.random_state = random_state

    def partial_fit(
        self,
        X: Any,
        y: Any,
        classes: Any = None,
        sample_weight: Any = None,
    ) -> Any:
        """Learn from rows one after the other, as they come: recursive least squares that forgets what is long ago.

        The first call sees how inputs are scaled and where gates begin: give it some rows, or scale them yourself and
        set ``standardize=False``.

        Args:
            X: inputs.
            y: classes.
            classes: all classes that there will be, in the first call; by default those that it sees.
            sample_weight: weight of each row.
        """
        return self._learned(X, y, sample_weight, classes=classes)
