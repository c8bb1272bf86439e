"""Classification: against logistic regression, with every setting, and on data that would break a careless fit."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from moesaic.classic import AdaptiveMixtureClassifier, HierarchicalMixtureClassifier
from moesaic.core.errors import ConfigError

BOTH = [AdaptiveMixtureClassifier, HierarchicalMixtureClassifier]


def corners(num_rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Opposite corners belong together: no line parts them, two do."""
    X = np.random.RandomState(seed).uniform(-1, 1, size=(num_rows, 2))
    return X, np.where(X[:, 0] * X[:, 1] > 0, "odd", "even")


def thirds(num_rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that overlap."""
    random = np.random.RandomState(0)
    label = random.randint(3, size=num_rows)
    return random.normal(size=(num_rows, 2)) + np.array([[0, 0], [2, 0], [0, 2]])[label], label


@pytest.mark.parametrize("make", BOTH)
def test_opposite_corners_are_told_apart(make):
    X, y = corners()
    fitted = make(random_state=0, n_init=3).fit(X, y)
    assert LogisticRegression().fit(X, y).score(X, y) < 0.7
    assert fitted.score(X, y) > 0.95
    assert fitted.classes_.tolist() == ["even", "odd"]
    assert set(fitted.predict(X)) == {"even", "odd"}
    np.testing.assert_allclose(fitted.predict_proba(X).sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.exp(fitted.predict_log_proba(X)), fitted.predict_proba(X))
    chance = fitted.predict_proba(X)[np.arange(300), (y == "odd").astype(int)]
    np.testing.assert_allclose(fitted.log_density(X, y), np.log(chance), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["two", "three"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_expert_is_logistic_regression(which, kind):
    X, y = thirds()
    X, y = (X, y) if kind == "three" else (X[y < 2], y[y < 2])
    settings = {"alpha": 2.0, "standardize": False, "tol": 1e-13}
    model = [AdaptiveMixtureClassifier(1, **settings), HierarchicalMixtureClassifier((), **settings)][which].fit(X, y)
    theirs = LogisticRegression(C=0.5, tol=1e-10, max_iter=1000).fit(X, y)
    np.testing.assert_allclose(model.coef_[0], theirs.coef_, rtol=1e-4)
    np.testing.assert_allclose(model.predict_proba(X), theirs.predict_proba(X), atol=1e-6)


@pytest.mark.parametrize("solver", ["em", "least-squares", "lbfgs", "gradient"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_solver_of_1994_fits(solver):
    X, y = corners()
    model = HierarchicalMixtureClassifier(solver=solver, max_iter=500, learning_rate=0.5, momentum=0.9, random_state=0)
    assert model.fit(X, y).score(X, y) > 0.9


@pytest.mark.parametrize("error", ["cooperative", "competitive", "mixture"])
@pytest.mark.parametrize("solver", ["lbfgs", "gradient"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_every_error_of_1991_fits(error, solver):
    X, y = thirds()
    settings = {"learning_rate": 0.5, "momentum": 0.9, "max_iter": 200, "random_state": 0}
    model = AdaptiveMixtureClassifier(error=error, solver=solver, **settings).fit(X, y)
    assert model.score(X, y) > LogisticRegression().fit(X, y).score(X, y) - 0.03
    assert model.error_curve_.min() < model.error_curve_[0]


@pytest.mark.parametrize("solver", ["em", "lbfgs"])
def test_networks_tell_corners_apart(solver):
    X, y = corners()
    # As little as two units each.
    model = AdaptiveMixtureClassifier(2, expert="mlp", hidden=2, solver=solver, random_state=0, tol=1e-3)
    assert model.fit(X, y).score(X, y) > 0.9


@pytest.mark.parametrize("labels", [2, 3])
def test_anybody_s_estimators_can_be_experts(labels):
    X, y = thirds()
    X, y = X[y < labels], y[y < labels]
    own = DecisionTreeClassifier(max_depth=2)
    model = AdaptiveMixtureClassifier(3, expert=own, random_state=0, tol=1e-2).fit(X, y)
    assert model.score(X, y) > LogisticRegression().fit(X, y).score(X, y) - 0.03
    assert model.predict_proba(X).shape == (len(y), labels)
    assert not hasattr(own, "tree_")


def test_two_classes_can_have_an_output_each():
    X, y = corners()
    model = HierarchicalMixtureClassifier(link="multinomial", random_state=0).fit(X, y)
    assert model.coef_.shape == (8, 2, 2)
    assert model.predict_proba(X).shape == (300, 2)
    # A constant in both η changes nothing: one of the two is free.
    count = 7 * 3 + 8 * 3
    assert model.aic(X, y) == pytest.approx(2 * count - 2 * model.log_density(X, y).sum())


def test_several_labels_at_once():
    X, _ = corners()
    y = np.stack([X[:, 0] > 0, X[:, 1] > 0.5, X[:, 0] + X[:, 1] > 0], axis=1).astype(int)
    model = HierarchicalMixtureClassifier((2,), random_state=0).fit(X, y)
    assert model.predict(X).shape == y.shape
    assert model.score(X, y) > 0.9
    chance = model.predict_proba(X)
    assert ((chance > 0) & (chance < 1)).all()
    drawn, _ = model.sample(X, random_state=0)
    assert (drawn == y).mean() > 0.9


def test_samples_are_classes_as_often_as_predicted():
    X, y = thirds()
    model = HierarchicalMixtureClassifier((2,), random_state=0).fit(X, y)
    many = np.tile([[1.0, 0.5]], (20000, 1))
    drawn, expert = model.sample(many, random_state=0)
    shares = np.bincount(drawn, minlength=3) / 20000
    np.testing.assert_allclose(shares, model.predict_proba(many[:1])[0], atol=0.02)
    assert set(expert) <= {0, 1}


DATA = {
    "one class": lambda X, y: (X, np.full(len(y), "odd")),
    "one row of each class": lambda X, y: (X[:3], np.array([0, 1, 2])),
    "two rows": lambda X, y: (X[:2], np.array([0, 1])),
    "parted by a line": lambda X, y: (X, (X[:, 0] > 0).astype(int)),
    "collinear": lambda X, y: (np.concatenate([X, X @ [[1.0], [1.0]]], axis=1), y),
    "huge": lambda X, y: (1e6 * X, y),
    "copies": lambda X, y: (np.repeat(X[:6], 20, axis=0), np.repeat(y[:6], 20)),
    "more columns than rows": lambda X, y: (np.random.RandomState(0).normal(size=(8, 30)), y[:8]),
    "more experts than rows": lambda X, y: (X[:5], np.array([0, 0, 1, 1, 2])),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("alpha", [0.0, 0.01])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_data_that_would_break_a_careless_fit(make, name, alpha):
    X, y = DATA[name](*corners())
    fitted = make(alpha=alpha, random_state=0, max_iter=30).fit(X, y)
    chance = fitted.predict_proba(X)
    assert chance.shape == (len(y), len(set(y)))
    assert np.isfinite(chance).all()
    assert np.isfinite(fitted.log_density(X, y)).all()
    assert (np.diff(fitted.loglik_curve_) > -1e-8).all()


def test_classes_that_were_not_there_are_refused():
    X, y = corners()
    model = HierarchicalMixtureClassifier((2,), random_state=0).fit(X, y)
    with pytest.raises(ConfigError) as error:
        model.log_density(X[:2], ["odd", "neither"])
    assert str(error.value) == "y needs classes among ['even', 'odd'], got ['neither']."


def test_bernoulli_needs_two_classes():
    X, y = thirds()
    with pytest.raises(ConfigError) as error:
        HierarchicalMixtureClassifier(link="bernoulli").fit(X, y)
    assert str(error.value) == (
        "link='bernoulli' needs two classes or columns of 0 and 1, got 3 classes. Take link='multinomial', or 'auto'."
    )
