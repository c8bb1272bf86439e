"""Row by row: recursive least squares is least squares, and a stream leads where passes lead."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import moesaic.classic.online as online
from moesaic.classic import HierarchicalMixtureClassifier, HierarchicalMixtureRegressor
from moesaic.classic.data import Data
from moesaic.classic.family import GAUSSIAN
from moesaic.classic.noise import Noise
from moesaic.classic.online import Online
from moesaic.classic.tree import Tree
from moesaic.core.errors import ConfigError
from tests.classic.problems import mixture, rows
from tests.classic.test_classifiers import corners, thirds
from tests.classic.test_regressors import kinked

FIXED = Noise(kind="fixed", floor_O=np.ones(2))


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_one_expert_row_by_row_is_least_squares_with_weights_that_decay(decay, monkeypatch):
    monkeypatch.setattr(online, "EXPERT_TRUST", 1e-9)
    random = np.random.RandomState(0)
    data = rows(GAUSSIAN, random, num_rows=40, width=3, num_outputs=2)
    start = mixture(GAUSSIAN, Tree.full(()), random, width=3, num_outputs=2)
    learner = Online(mixture=start, noise=FIXED, decay=decay)
    learner.learn(data)
    root_T1 = np.sqrt(data.weight_T * decay ** np.arange(40)[::-1])[:, None]
    expected = np.linalg.lstsq(root_T1 * data.x_TD, root_T1 * data.y_TO, rcond=None)[0]
    np.testing.assert_allclose(learner.coef_EOD[0], expected.T, rtol=1e-4, atol=1e-6)


def test_one_row_moves_experts_by_the_recursion_of_weighted_least_squares():
    random = np.random.RandomState(0)
    start = mixture(GAUSSIAN, Tree.full((2, 2)), random, width=3, num_outputs=2)
    data = rows(GAUSSIAN, random, num_rows=1, width=3, num_outputs=2)
    learner = Online(mixture=start, noise=FIXED, decay=0.95)
    posterior_TE, loglik_T = start.posterior(data.x_TD, data.y_TO)
    assert learner.learn(data) == pytest.approx(loglik_T[0])
    x_D, residual_EO = data.x_TD[0], (data.y_TO[:, None] - start.means(data.x_TD))[0]
    for expert in range(4):
        # R, started at I / trust, by inverting what is summed up; U += h (y − μ) xᵀ R.
        inverse = 0.95 * online.EXPERT_TRUST * np.eye(3) + posterior_TE[0, expert] * np.outer(x_D, x_D)
        step = posterior_TE[0, expert] * np.outer(residual_EO[expert], np.linalg.solve(inverse, x_D))
        np.testing.assert_allclose(learner.coef_EOD[expert], start.experts.arrays[0][expert] + step, rtol=1e-8)
    # The top gate: v += (ln h − v x) S x.
    share_A = (posterior_TE @ start.tree.path_AE.T)[0]
    inverse = 0.95 * online.GATE_TRUST * np.eye(3) + np.outer(x_D, x_D)
    wrong = np.log(share_A[:2]) - start.gate_AD[:2] @ x_D
    expected = start.gate_AD[:2] + np.outer(wrong, np.linalg.solve(inverse, x_D))
    np.testing.assert_allclose(learner.gate_AD[:2], expected, rtol=1e-8)


def test_the_decay_goes_towards_one():
    random = np.random.RandomState(0)
    start = mixture(GAUSSIAN, Tree.full(()), random, width=2, num_outputs=1)
    data = Data(x_TD=random.normal(size=(2000, 2)), y_TO=random.normal(size=(2000, 1)), weight_T=np.ones(2000))
    learner = Online(mixture=start, noise=Noise(kind="shared", floor_O=np.ones(1)), decay=0.99)
    learner.learn(data)
    assert 1 - learner.decay == pytest.approx(0.01 * 0.4**2)


@pytest.mark.parametrize("variance", [0.01, "shared", "expert"])
def test_a_stream_leads_where_passes_lead(variance):
    X, y = kinked(2000)
    stream = HierarchicalMixtureRegressor((2, 2), variance=variance, random_state=0)
    for start in range(0, 2000, 100):
        stream.partial_fit(X[start : start + 100], y[start : start + 100])
    assert stream.score(*kinked(300, seed=1)) > 0.98
    if variance != 0.01:
        assert np.sqrt(np.median(stream.variances_)) < 0.35


def test_a_stream_cut_otherwise_is_the_same_stream():
    X, y = kinked(200)
    settings = {"branching": (2, 2), "standardize": False, "random_state": 0}
    whole = HierarchicalMixtureRegressor(**settings).partial_fit(X[:100], y[:100]).partial_fit(X[100:], y[100:])
    pieces = HierarchicalMixtureRegressor(**settings).partial_fit(X[:100], y[:100])
    for row in range(100, 200):
        pieces.partial_fit(X[row : row + 1], y[row : row + 1])
    np.testing.assert_allclose(pieces.predict(X), whole.predict(X), rtol=1e-10)


def test_a_fit_can_be_followed_by_a_stream_and_a_stream_by_a_fit():
    X, y = kinked(400)
    model = HierarchicalMixtureRegressor((2, 2), random_state=0).fit(X, y)
    before = model.score(X, y)
    assert model.partial_fit(X, y).score(X, y) > before - 0.02
    assert model.fit(X, y).score(X, y) == pytest.approx(before)


def test_classes_and_counts_stream_too():
    X, y = corners(1500)
    model = HierarchicalMixtureClassifier((2, 2), random_state=0)
    for start in range(0, 1500, 500):
        model.partial_fit(X[start : start + 500], y[start : start + 500], classes=["even", "odd"])
    assert model.score(X, y) > 0.9
    X, y = thirds(600)
    line = LogisticRegression().fit(X, y).score(X, y)
    assert HierarchicalMixtureClassifier((2,), random_state=0).partial_fit(X, y).score(X, y) > line - 0.05
    random = np.random.RandomState(0)
    X = random.uniform(-1, 1, size=(1500, 1))
    y = random.poisson(np.exp(np.where(X[:, 0] > 0, 2 * X[:, 0], -X[:, 0]))).astype(float)
    model = HierarchicalMixtureRegressor((2,), link="poisson", random_state=0).partial_fit(X, y)
    assert model.predict([[-1.0], [0.0], [1.0]]) == pytest.approx(np.exp([1, 0, 2]), rel=0.3)


def test_a_class_that_comes_later_has_to_be_named_at_first():
    X, y = thirds()
    model = HierarchicalMixtureClassifier((2,), random_state=0).partial_fit(X[y < 2], y[y < 2])
    with pytest.raises(ConfigError, match=r"^y needs classes among \[0, 1\], got \[2\]\.$"):
        model.partial_fit(X, y)
    named = HierarchicalMixtureClassifier((2,), random_state=0).partial_fit(X[y < 2], y[y < 2], classes=[0, 1, 2])
    assert named.partial_fit(X, y).predict_proba(X).shape == (len(y), 3)
