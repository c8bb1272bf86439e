"""Regression: against closed forms, in any units, with every setting, on data that would break a careless fit."""

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LinearRegression, PoissonRegressor, Ridge
from sklearn.svm import SVR
from sklearn.tree import DecisionTreeRegressor

from moesaic.classic import AdaptiveMixtureRegressor, HierarchicalMixtureRegressor
from moesaic.core.errors import ConfigError

BOTH = [AdaptiveMixtureRegressor, HierarchicalMixtureRegressor]


def kinked(num_rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two lines that meet at 0, with a little noise."""
    random = np.random.RandomState(seed)
    X = random.uniform(-2, 2, size=(num_rows, 1))
    y = np.where(X[:, 0] > 0, 3 * X[:, 0], -X[:, 0]) + 0.1 * random.normal(size=num_rows)
    return X, y


def one_expert(**settings):
    return [AdaptiveMixtureRegressor(1, **settings), HierarchicalMixtureRegressor((), **settings)]


@pytest.mark.parametrize("model", one_expert(alpha=0.0, tol=1e-12))
def test_one_expert_is_linear_regression(model):
    random = np.random.RandomState(0)
    X, y = random.normal(size=(50, 3)) * [1, 100, 0.1] + 5, random.normal(size=(50, 2)) * [1, 1e4]
    theirs = LinearRegression().fit(X, y)
    model.fit(X, y)
    np.testing.assert_allclose(model.coef_[0], theirs.coef_, rtol=1e-6)
    np.testing.assert_allclose(model.intercept_[0], theirs.intercept_, rtol=1e-6)
    np.testing.assert_allclose(model.predict(X), theirs.predict(X), rtol=1e-6)
    residual = y - theirs.predict(X)
    np.testing.assert_allclose(model.variances_[0], (residual**2).mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("model", one_expert(alpha=3.0, standardize=False, variance=1.0, tol=1e-12))
def test_one_expert_with_a_penalty_is_ridge_regression(model):
    random = np.random.RandomState(0)
    X, y = random.normal(size=(50, 3)), random.normal(size=50)
    np.testing.assert_allclose(model.fit(X, y).coef_[0, 0], Ridge(alpha=3.0).fit(X, y).coef_, rtol=1e-6)


def test_one_poisson_expert_is_poisson_regression():
    random = np.random.RandomState(0)
    X = random.normal(size=(80, 2))
    y = random.poisson(np.exp(X @ [0.5, -0.3] + 1)).astype(float)
    ours = HierarchicalMixtureRegressor((), link="poisson", alpha=0.0, tol=1e-12).fit(X, y)
    theirs = PoissonRegressor(alpha=0.0, tol=1e-10).fit(X, y)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-5)


@pytest.mark.parametrize("model", BOTH)
def test_a_kink_is_found_and_each_side_has_its_line(model):
    X, y = kinked()
    # Two experts, in whichever class.
    settings = {"num_experts": 2} if model is AdaptiveMixtureRegressor else {"branching": (2,)}
    fitted = model(random_state=0, tol=1e-6, alpha=1e-4, **settings).fit(X, y)
    assert sorted(fitted.coef_.ravel()) == pytest.approx([-1, 3], abs=0.05)
    assert fitted.variances_.ravel() == pytest.approx([0.01, 0.01], rel=0.5)
    left, right = fitted.apply([[-1.0], [1.0]])
    assert left != right
    assert fitted.gate([[-1.0], [1.0]]).max(axis=1) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("solver", ["em", "least-squares", "lbfgs", "gradient"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_solver_of_1994_fits(solver):
    X, y = kinked()
    # Where noise is small the error is steep: a step has to be short.
    settings = {"learning_rate": 0.01, "momentum": 0.9, "max_iter": 1000}
    model = HierarchicalMixtureRegressor((2, 2), solver=solver, random_state=0, **settings)
    assert model.fit(X, y).score(X, y) > 0.98
    assert len(model.loglik_curve_) == model.n_iter_ + 1
    assert model.loglik_curve_[-1] > model.loglik_curve_[0]


@pytest.mark.parametrize("error", ["cooperative", "competitive", "mixture"])
@pytest.mark.parametrize("solver", ["lbfgs", "gradient"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_error_of_1991_falls(error, solver):
    X, y = kinked()
    settings = {"learning_rate": 0.02, "momentum": 0.9, "max_iter": 1000, "alpha": 0.0}
    model = AdaptiveMixtureRegressor(error=error, solver=solver, random_state=0, **settings).fit(X, y)
    assert model.score(X, y) > 0.9
    assert model.error_curve_[-1] < model.error_curve_[0] - (1 if error == "mixture" else 0.5 * model.error_curve_[0])
    assert model.log_density(X, y).mean() == pytest.approx(model.loglik_curve_[model.error_curve_.argmin()])


def test_stochastic_steps_come_to_the_same_as_whole_passes():
    X, y = kinked()
    settings = {"error": "cooperative", "solver": "gradient", "max_iter": 60, "random_state": 0, "tol": 0.0}
    with pytest.warns(ConvergenceWarning):
        model = AdaptiveMixtureRegressor(batch_size=20, learning_rate=0.05, **settings).fit(X, y)
    assert model.score(X, y) > 0.95


@pytest.mark.parametrize("variance", [0.01, "shared", "expert"])
@pytest.mark.parametrize("model", BOTH)
def test_noise_is_given_or_estimated_once_or_for_each_expert(model, variance):
    X, y = kinked()
    noisy = np.where(X[:, 0] > 0, 10.0, 1.0) * 0.1 * np.random.RandomState(1).normal(size=len(y))
    fitted = model(variance=variance, random_state=0).fit(X, y + noisy)
    spread = fitted.variances_.max() / fitted.variances_.min()
    assert spread > 5 if variance == "expert" else spread == pytest.approx(1)
    if variance == 0.01:
        np.testing.assert_allclose(fitted.variances_, 0.01)


def test_a_cooperative_model_answers_with_one_distribution_around_the_blend():
    X, y = kinked()
    model = AdaptiveMixtureRegressor(error="cooperative", solver="lbfgs", random_state=0).fit(X, y)
    told = model.predict_dist(X)
    assert told.weights.shape == (len(y), 1)
    np.testing.assert_allclose(told.mean, model.predict(X), rtol=1e-10)
    assert told.std[0] == pytest.approx(np.sqrt(np.mean((y - model.predict(X)) ** 2)))
    np.testing.assert_allclose(model.responsibilities(X, y), model.gate(X), rtol=1e-10)


def test_networks_bend_where_lines_cannot():
    X = np.linspace(-3, 3, 200)[:, None]
    y = np.sin(2 * X[:, 0])
    line = AdaptiveMixtureRegressor(1, random_state=0).fit(X, y).score(X, y)
    net = AdaptiveMixtureRegressor(2, expert="mlp", hidden=6, random_state=0, max_iter=300).fit(X, y)
    assert line < 0.5
    assert net.score(X, y) > 0.95
    assert (np.diff(net.loglik_curve_) > -1e-8).all()


def test_anybody_s_estimators_can_be_experts():
    X, y = kinked()
    model = AdaptiveMixtureRegressor(expert=DecisionTreeRegressor(max_depth=2), random_state=0, tol=1e-2).fit(X, y)
    assert model.score(X, y) > 0.9
    depths = [tree.get_depth() for tree in model.experts_.estimators]
    assert depths == [2] * 4
    assert AdaptiveMixtureRegressor(2, expert=SVR(), random_state=0, tol=1e-2).fit(X, y).score(X, y) > 0.9


def test_outputs_are_fitted_together_and_answered_in_their_shape():
    X, y = kinked()
    model = HierarchicalMixtureRegressor((2,), random_state=0).fit(X, np.stack([y, 100 * y + 7], axis=1))
    told = model.predict(X)
    assert told.shape == (len(y), 2)
    np.testing.assert_allclose(told[:, 1], 100 * told[:, 0] + 7, rtol=1e-6)
    assert model.log_density(X, np.stack([y, 100 * y + 7], axis=1)).shape == (len(y),)
    assert HierarchicalMixtureRegressor((2,), random_state=0).fit(X, y[:, None]).predict(X).shape == (len(y), 1)


@pytest.mark.parametrize("model", BOTH)
def test_units_do_not_matter(model):
    X, y = kinked()
    plain = model(random_state=0).fit(X, y)
    other = model(random_state=0).fit(1e6 * X + 3e6, 1e-3 * y - 5)
    np.testing.assert_allclose(other.predict(1e6 * X + 3e6), 1e-3 * plain.predict(X) - 5, rtol=1e-6)
    assert other.log_density(1e6 * X + 3e6, 1e-3 * y - 5).mean() == pytest.approx(
        plain.log_density(X, y).mean() + np.log(1e3), rel=1e-6
    )


DATA = {
    "collinear": lambda X, y: (np.concatenate([X, 2 * X, X - 1], axis=1), y),
    "constant column": lambda X, y: (np.concatenate([X, np.full_like(X, 7.0)], axis=1), y),
    "huge": lambda X, y: (1e6 * X, 1e6 * y),
    "copies": lambda X, y: (np.repeat(X[:10], 30, axis=0), np.repeat(y[:10], 30)),
    "constant target": lambda X, y: (X, np.full_like(y, 3.0)),
    "one row": lambda X, y: (X[:1], y[:1]),
    "two rows": lambda X, y: (X[:2], y[:2]),
    "an outlier": lambda X, y: (np.append(X, [[1e8]], axis=0), np.append(y, 1e8)),
    "more columns than rows": lambda X, y: (np.random.RandomState(0).normal(size=(8, 30)), y[:8]),
}


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("model", BOTH)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_data_that_would_break_a_careless_fit(model, name, standardize):
    X, y = DATA[name](*kinked())
    # As many experts as there are rows in some of these: most have nothing to do.
    fitted = model(standardize=standardize, random_state=0, max_iter=30).fit(X, y)
    assert np.isfinite(fitted.predict(X)).all()
    assert np.isfinite(fitted.log_density(X, y)).all()
    assert np.isfinite(fitted.loglik_curve_).all()
    assert (np.diff(fitted.loglik_curve_) > -1e-8 * np.maximum(1, np.abs(fitted.loglik_curve_[:-1]))).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_counts_of_zero_alone_and_of_millions():
    X = np.linspace(0, 1, 30)[:, None]
    for y in (np.zeros(30), np.full(30, 5e6), np.where(X[:, 0] > 0.5, 4e6, 0.0)):
        model = HierarchicalMixtureRegressor((2,), link="poisson", random_state=0, max_iter=100).fit(X, y)
        assert (np.diff(model.loglik_curve_) > -1e-8 * np.abs(model.loglik_curve_[:-1])).all()
        assert np.abs(model.predict(X) - y).mean() <= 0.1 * y.mean() + 0.05


@pytest.mark.parametrize("model", BOTH)
def test_a_weight_of_two_is_a_row_that_comes_twice(model):
    X, y = kinked(40)
    weight = np.random.RandomState(0).randint(3, size=40)
    weighted = model(random_state=0, n_init=2).fit(X, y, sample_weight=weight)
    repeated = model(random_state=0, n_init=2).fit(np.repeat(X, weight, axis=0), np.repeat(y, weight))
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), rtol=1e-6, atol=1e-8)


def test_of_several_beginnings_the_best_is_kept():
    X, y = kinked()
    each = [HierarchicalMixtureRegressor(random_state=seed).fit(X, y).loglik_curve_[-1] for seed in range(3)]
    assert len(set(each)) == 3
    once = HierarchicalMixtureRegressor(random_state=0).fit(X, y).loglik_curve_.max()
    assert HierarchicalMixtureRegressor(random_state=0, n_init=5).fit(X, y).loglik_curve_.max() >= once


def test_a_warm_start_goes_on_where_the_last_fit_ended():
    X, y = kinked()
    model = HierarchicalMixtureRegressor(random_state=0, warm_start=True, max_iter=3, tol=0.0)
    with pytest.warns(ConvergenceWarning, match=r"changed by more than tol=0 after max_iter=3 passes"):
        model.fit(X, y)
    first = model.loglik_curve_
    with pytest.warns(ConvergenceWarning):
        second = model.fit(X, y).loglik_curve_
    assert second[0] == pytest.approx(first[-1], rel=1e-12)
    assert second[-1] > first[-1]


def test_a_warm_start_from_another_form_is_refused():
    X, y = kinked()
    model = HierarchicalMixtureRegressor((2,), warm_start=True).fit(X, y)
    with pytest.raises(ConfigError) as error:
        model.set_params(branching=(3,)).fit(X, y)
    assert str(error.value) == (
        "warm_start goes on with what is there, 2 experts for 1 inputs and 1 outputs; asked for were 3 experts, 1 "
        "inputs and 1 outputs. Set warm_start=False to begin anew."
    )


def test_algorithm_2_keeps_its_best_pass():
    X, y = kinked(60, seed=3)
    for seed in range(5):
        model = HierarchicalMixtureRegressor((2, 2), solver="least-squares", random_state=seed, alpha=0.0).fit(X, y)
        assert model.log_density(X, y).mean() == pytest.approx(model.loglik_curve_.max())


def test_information_criteria_count_parameters():
    X, y = kinked()
    n, loglik = len(y), None
    for variance, noise in ((0.01, 0), ("shared", 1), ("expert", 4)):
        model = HierarchicalMixtureRegressor((2, 2), variance=variance, random_state=0).fit(X, y)
        loglik = model.log_density(X, y).sum()
        # Three gates of one free logit and four experts, each with a slope and an intercept.
        count = 3 * 2 + 4 * 2 + noise
        assert model.aic(X, y) == pytest.approx(2 * count - 2 * loglik)
        assert model.bic(X, y) == pytest.approx(count * np.log(n) - 2 * loglik)
    own = AdaptiveMixtureRegressor(expert=DecisionTreeRegressor(max_depth=1), random_state=0).fit(X, y)
    with pytest.raises(ConfigError, match="number of parameters"):
        own.bic(X, y)


def test_samples_have_the_mean_and_the_variance_that_are_predicted():
    X, y = kinked()
    model = HierarchicalMixtureRegressor(random_state=0).fit(X, y)
    many = np.full((20000, 1), 0.02)
    drawn, expert = model.sample(many, random_state=0)
    told = model.predict_dist(many[:1])
    assert drawn.mean() == pytest.approx(told.mean[0], abs=4 * told.std[0] / np.sqrt(20000))
    assert drawn.std() == pytest.approx(told.std[0], rel=0.05)
    shares = np.bincount(expert, minlength=8) / 20000
    np.testing.assert_allclose(shares, model.gate(many[:1])[0], atol=0.02)
    again, _ = model.sample(many, random_state=0)
    np.testing.assert_array_equal(drawn, again)


def test_attributes_that_a_model_has_not_say_so():
    X, y = kinked(50)
    net = AdaptiveMixtureRegressor(2, expert="mlp", max_iter=2, tol=100.0, random_state=0).fit(X, y)
    with pytest.raises(AttributeError, match="linear experts"):
        _ = net.coef_
    counts = HierarchicalMixtureRegressor(link="poisson").fit(X, np.ones(50))
    with pytest.raises(AttributeError, match="poisson"):
        _ = counts.variances_
    for name in ("coef_", "gate_coef_", "variances_", "num_experts_"):
        with pytest.raises((AttributeError, NotFittedError)):
            getattr(AdaptiveMixtureRegressor(), name)
