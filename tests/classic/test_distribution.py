"""Predicted distributions: moments, quantiles and densities agree with each other and with numerical integrals."""

import numpy as np
import pytest
from scipy.integrate import quad

from moesaic.classic import AdaptiveMixtureRegressor, HierarchicalMixtureRegressor, Prediction
from moesaic.classic.family import GAUSSIAN, POISSON
from moesaic.core.errors import ConfigError, ShapeError
from tests.classic.test_regressors import kinked

TWO_HUMPS = Prediction(
    log_weight_TE=np.log([[0.3, 0.7], [0.5, 0.5]]),
    mean_TEO=np.array([[[-2.0], [1.0]], [[0.0], [30.0]]]),
    dispersion_EO=np.array([[0.25], [1.0]]),
    family=GAUSSIAN,
    is_flat=True,
)
COUNTS = Prediction(
    log_weight_TE=np.log([[0.4, 0.6]]),
    mean_TEO=np.array([[[1.5], [9.0]]]),
    dispersion_EO=np.ones((2, 1)),
    family=POISSON,
    is_flat=True,
)


@pytest.mark.parametrize("row", [0, 1])
def test_moments_are_integrals_of_the_density(row):
    def density(y: float) -> float:
        return float(TWO_HUMPS.pdf(y)[row])

    limits = {"a": -20, "b": 60, "points": [-2, 0, 1, 30], "limit": 200}
    total, mean = quad(density, **limits)[0], quad(lambda y: y * density(y), **limits)[0]
    square = quad(lambda y: (y - mean) ** 2 * density(y), **limits)[0]
    assert total == pytest.approx(1)
    assert TWO_HUMPS.mean[row] == pytest.approx(mean)
    assert TWO_HUMPS.variance[row] == pytest.approx(square)
    assert TWO_HUMPS.std[row] == pytest.approx(np.sqrt(square))
    below = quad(density, -20, 0.5, points=[-2, 0])[0]
    assert TWO_HUMPS.cdf([0.5, 0.5])[row] == pytest.approx(below)


def test_quantiles_undo_the_distribution_function():
    for share in (0.001, 0.3, 0.5, 0.9999):
        np.testing.assert_allclose(TWO_HUMPS.cdf(TWO_HUMPS.quantile(share)), share, rtol=1e-9)
    low, high = TWO_HUMPS.interval(0.8)
    np.testing.assert_allclose(TWO_HUMPS.quantile([0.1, 0.9]), [low, high])


def test_quantiles_of_counts_are_the_least_that_reach_the_share():
    k = np.arange(60)
    chance = np.array([COUNTS.pdf([one])[0] for one in k])
    assert chance.sum() == pytest.approx(1)
    assert COUNTS.mean[0] == pytest.approx((k * chance).sum())
    assert COUNTS.variance[0] == pytest.approx(((k - COUNTS.mean[0]) ** 2 * chance).sum())
    for share in (0.01, 0.2, 0.5, 0.97):
        assert COUNTS.quantile(share)[0] == k[np.searchsorted(chance.cumsum(), share)]


@pytest.mark.parametrize("q", [0.0, 1.0, [0.5, 1.5], float("nan")])
def test_a_quantile_needs_a_probability(q):
    with pytest.raises(ConfigError, match=r"^A quantile needs probabilities between 0 and 1, without the ends; got "):
        TWO_HUMPS.quantile(q)


def test_a_target_of_another_shape_is_refused():
    with pytest.raises(ShapeError) as error:
        TWO_HUMPS.pdf([1.0, 2.0, 3.0])
    assert str(error.value) == "A target for each row was needed, of shape (2,); got (3,)."


def test_a_fitted_model_s_distribution_is_calibrated_and_has_its_units():
    X, y = kinked(2000)
    model = HierarchicalMixtureRegressor((2,), random_state=0).fit(X, 50 * y)
    told = model.predict_dist(X)
    np.testing.assert_allclose(told.mean, model.predict(X), rtol=1e-10)
    np.testing.assert_allclose(told.logpdf(50 * y), model.log_density(X, 50 * y), rtol=1e-10)
    assert told.std.min() == pytest.approx(5, rel=0.2)
    for share in (0.05, 0.5, 0.95):
        assert (50 * y <= told.quantile(share)).mean() == pytest.approx(share, abs=0.02)


def test_several_outputs_have_quantiles_of_their_own_and_a_density_together():
    X, y = kinked()
    both = np.stack([y, -10 * y], axis=1)
    told = AdaptiveMixtureRegressor(2, random_state=0).fit(X, both).predict_dist(X)
    assert told.quantile([0.1, 0.5]).shape == (2, 300, 2)
    assert told.pdf(both).shape == (300,)
    # What one output is above, the other is below.
    np.testing.assert_allclose(told.quantile(0.9)[:, 1], -10 * told.quantile(0.1)[:, 0], rtol=1e-5)
    with pytest.raises(ShapeError, match=r"of shape \(300, 2\); got \(300,\)"):
        told.pdf(y)
