"""What is random about a target: Gaussian, Bernoulli, multinomial or Poisson, each told by its natural parameter η.

In an exponential family the mean is A′(η) and the curvature A″(η), where A is the log partition. So one Newton step
fits experts of every family, and gates too, which are multinomial with soft targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, gammaln, logit, ndtr, pdtr

from moesaic.classic.tree import Floats

LARGEST_EXPONENT = 500.0
SMALLEST_SHARE = 1e-10
"""How near to 0 or 1 a probability may come when its η is asked for, which would be infinite there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A distribution by its functions; η is the natural parameter and φ the dispersion, a Gaussian's variance.

    Attributes:
        name: as users write it.
        log_partition: η (T, E, O) -> A(η), of each output, or of all together where they are coupled (T, E, 1).
        mean: η -> A′(η).
        curvature: mean -> A″ on the diagonal.
        link: mean -> η.
        loglik: target (T, O), η (T, E, O), φ (E, O) -> log-density of each target under each expert (T, E).
        draw: random numbers, mean (T, O), φ (T, O) -> a target for each row.
        variance: mean, φ -> the variance of a target.
        cdf: target, mean, φ -> the probability of no more, one output at a time.
        coupled: whether the mean of one output depends on the η of the others.
        is_gaussian: A is quadratic, so that one Newton step is exact; and there is a φ to estimate.
        is_discrete: whether targets are whole numbers.
    """

    name: str
    log_partition: Callable[[Floats], Floats]
    mean: Callable[[Floats], Floats]
    curvature: Callable[[Floats], Floats]
    link: Callable[[Floats], Floats]
    loglik: Callable[[Floats, Floats, Floats], Floats]
    draw: Callable[[np.random.RandomState, Floats, Floats], Floats]
    variance: Callable[[Floats, Floats], Floats]
    cdf: Callable[[Floats, Floats, Floats], Floats]
    coupled: bool = False
    is_gaussian: bool = False
    is_discrete: bool = False

    def __reduce__(self) -> tuple[Callable[[str], Family], tuple[str]]:
        """By its name: functions without one cannot be pickled, and a copy should be the same object."""
        return family_named, (self.name,)

    def through_mean(self, mean_TEO: Floats, d_mean_TEO: Floats) -> Floats:
        """From a derivative by the mean to the derivative by η."""
        if self.coupled:
            d_eta_TEO: Floats = mean_TEO * (d_mean_TEO - (mean_TEO * d_mean_TEO).sum(axis=-1, keepdims=True))
            return d_eta_TEO
        return self.curvature(mean_TEO) * d_mean_TEO

    def score(self, y_TO: Floats, mean_TEO: Floats, dispersion_EO: Floats) -> Floats:
        """Derivative of the log-likelihood by η: the residual over φ (T, E, O)."""
        return (y_TO[:, None, :] - mean_TEO) / dispersion_EO


def _gaussian_loglik(y_TO: Floats, eta_TEO: Floats, dispersion_EO: Floats) -> Floats:
    squares_TE = over_last(np.add, (y_TO[:, None, :] - eta_TEO) ** 2 / dispersion_EO)
    loglik_TE: Floats = -0.5 * (squares_TE + np.log(2 * np.pi * dispersion_EO).sum(axis=-1))
    return loglik_TE


def _bernoulli_loglik(y_TO: Floats, eta_TEO: Floats, _dispersion_EO: Floats) -> Floats:
    return over_last(np.add, y_TO[:, None, :] * eta_TEO - np.logaddexp(0.0, eta_TEO))


def _multinomial_loglik(y_TO: Floats, eta_TEO: Floats, _dispersion_EO: Floats) -> Floats:
    return over_last(np.add, y_TO[:, None, :] * (eta_TEO - _logsumexp(eta_TEO)))


def _poisson_loglik(y_TO: Floats, eta_TEO: Floats, _dispersion_EO: Floats) -> Floats:
    free_T = gammaln(y_TO + 1).sum(axis=-1)
    loglik_TE: Floats = over_last(np.add, y_TO[:, None, :] * eta_TEO - _exp(eta_TEO)) - free_T[:, None]
    return loglik_TE


def _exp(eta_TEO: Floats) -> Floats:
    """Finite on the way of a Newton step that overshoots."""
    return np.exp(np.minimum(eta_TEO, LARGEST_EXPONENT))


def over_last(reduce: np.ufunc, values: Floats) -> Floats:
    """Reduce the last dimension. numpy takes several times as long where that has few entries, as outputs mostly do."""
    if values.shape[-1] > 8:
        reduced: Floats = reduce.reduce(values, axis=-1)
        return reduced
    reduced = values[..., 0].copy()
    for one in range(1, values.shape[-1]):
        reduce(reduced, values[..., one], out=reduced)
    return reduced


def _logsumexp(eta_TEO: Floats) -> Floats:
    largest_TE1 = over_last(np.maximum, eta_TEO)[..., None]
    return largest_TE1 + np.log(over_last(np.add, np.exp(eta_TEO - largest_TE1)))[..., None]


def _softmax(eta_TEO: Floats) -> Floats:
    share_TEO = np.exp(eta_TEO - over_last(np.maximum, eta_TEO)[..., None])
    share_TEO /= over_last(np.add, share_TEO)[..., None]
    return share_TEO


def _draw_class(random: np.random.RandomState, mean_TO: Floats, _dispersion_TO: Floats) -> Floats:
    """One of the outputs, as a row with a single 1."""
    drawn_T = (random.uniform(size=(len(mean_TO), 1)) > mean_TO.cumsum(axis=-1)).sum(axis=-1)
    rows_TO: Floats = np.eye(mean_TO.shape[-1])[np.minimum(drawn_T, mean_TO.shape[-1] - 1)]
    return rows_TO


GAUSSIAN = Family(
    name="gaussian",
    log_partition=lambda eta_TEO: 0.5 * eta_TEO**2,
    mean=lambda eta_TEO: eta_TEO,
    curvature=np.ones_like,
    link=lambda mean_TEO: mean_TEO,
    loglik=_gaussian_loglik,
    draw=lambda random, mean_TO, dispersion_TO: random.normal(mean_TO, np.sqrt(dispersion_TO)),
    variance=lambda mean_TEO, dispersion_EO: dispersion_EO + np.zeros_like(mean_TEO),
    cdf=lambda y_TEO, mean_TEO, dispersion_EO: ndtr((y_TEO - mean_TEO) / np.sqrt(dispersion_EO)),
    is_gaussian=True,
)
BERNOULLI = Family(
    name="bernoulli",
    log_partition=lambda eta_TEO: np.logaddexp(0.0, eta_TEO),
    mean=expit,
    curvature=lambda mean_TEO: mean_TEO * (1 - mean_TEO),
    link=lambda mean_TEO: logit(np.clip(mean_TEO, SMALLEST_SHARE, 1 - SMALLEST_SHARE)),
    loglik=_bernoulli_loglik,
    draw=lambda random, mean_TO, _: (random.uniform(size=mean_TO.shape) < mean_TO).astype(np.float64),
    variance=lambda mean_TEO, _: mean_TEO * (1 - mean_TEO),
    cdf=lambda y_TEO, mean_TEO, _: np.where(y_TEO >= 1, 1.0, np.where(y_TEO >= 0, 1 - mean_TEO, 0.0)),
    is_discrete=True,
)
MULTINOMIAL = Family(
    name="multinomial",
    log_partition=_logsumexp,
    mean=_softmax,
    curvature=lambda mean_TEO: mean_TEO * (1 - mean_TEO),
    link=lambda mean_TEO: np.log(np.maximum(mean_TEO, SMALLEST_SHARE)),
    loglik=_multinomial_loglik,
    draw=_draw_class,
    variance=lambda mean_TEO, _: mean_TEO * (1 - mean_TEO),
    cdf=lambda y_TEO, mean_TEO, _: np.where(y_TEO >= 1, 1.0, np.where(y_TEO >= 0, 1 - mean_TEO, 0.0)),
    coupled=True,
    is_discrete=True,
)
POISSON = Family(
    name="poisson",
    log_partition=_exp,
    mean=_exp,
    curvature=lambda mean_TEO: mean_TEO,
    link=lambda mean_TEO: np.log(np.maximum(mean_TEO, SMALLEST_SHARE)),
    loglik=_poisson_loglik,
    draw=lambda random, mean_TO, _: random.poisson(mean_TO).astype(np.float64),
    variance=lambda mean_TEO, _: mean_TEO,
    cdf=lambda y_TEO, mean_TEO, _: np.where(y_TEO < 0, 0.0, pdtr(np.floor(np.maximum(y_TEO, 0)), mean_TEO)),
    is_discrete=True,
)
FAMILIES = {family.name: family for family in (GAUSSIAN, BERNOULLI, MULTINOMIAL, POISSON)}


def family_named(name: str) -> Family:
    """One of the four."""
    return FAMILIES[name]
