"""Newton's steps against closed forms, scikit-learn and scipy."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge

from moesaic.classic.data import Data
from moesaic.classic.family import BERNOULLI, GAUSSIAN, MULTINOMIAL, POISSON
from moesaic.classic.gate import by_least_squares, by_newton, log_branches
from moesaic.classic.irls import LinearFit, contrasts
from moesaic.classic.least_squares import damped_solve, weighted_grams
from moesaic.classic.tree import Tree
from tests.classic.problems import rows
from tests.classic.test_tree import UNEVEN


def fitted(family, data: Data, penalty: float = 0.0, steps: int = 30) -> np.ndarray:
    """One map, from zero."""
    fit = LinearFit(
        data=data,
        family=family,
        target_TEO=(data.weight_T[:, None] * data.y_TO)[:, None],
        weight_TE=data.weight_T[:, None],
        penalty_EO=np.full((1, data.y_TO.shape[1]), penalty),
    )
    return fit.newton(np.zeros((1, data.y_TO.shape[1], data.x_TD.shape[1])), steps=steps)[0]


@pytest.mark.parametrize("num_rows", [0, 1, 7, 5000])
def test_weighted_grams_are_sums_of_outer_products(num_rows):
    random = np.random.RandomState(0)
    x_TD, weight_TE = random.normal(size=(num_rows, 5)), random.uniform(size=(num_rows, 3))
    expected = np.einsum("te,ta,tb->eab", weight_TE, x_TD, x_TD)
    np.testing.assert_allclose(weighted_grams(x_TD, weight_TE), expected, rtol=1e-10, atol=1e-12)


def test_a_direction_that_no_row_speaks_for_is_left_alone():
    step = damped_solve(np.zeros((1, 2, 2)), np.zeros((1, 2, 1)), np.ones(2))
    assert step.tolist() == [[[0.0], [0.0]]]


def test_gaussian_experts_are_ridge_regression():
    data = rows(GAUSSIAN, np.random.RandomState(0), num_rows=40, width=4, num_outputs=2)
    ridge = Ridge(alpha=2.0).fit(data.x_TD[:, :-1], data.y_TO, sample_weight=data.weight_T)
    coef_OD = fitted(GAUSSIAN, data, penalty=2.0)
    np.testing.assert_allclose(coef_OD[:, :-1], ridge.coef_, rtol=1e-6)
    np.testing.assert_allclose(coef_OD[:, -1], ridge.intercept_, rtol=1e-6)


def test_bernoulli_experts_are_logistic_regression():
    data = rows(BERNOULLI, np.random.RandomState(0), num_rows=60, width=4, num_outputs=1)
    theirs = LogisticRegression(C=0.5, tol=1e-10, max_iter=1000)
    theirs.fit(data.x_TD[:, :-1], data.y_TO[:, 0], sample_weight=data.weight_T)
    np.testing.assert_allclose(fitted(BERNOULLI, data, penalty=2.0)[0, :-1], theirs.coef_[0], rtol=1e-5)


def test_multinomial_experts_are_softmax_regression():
    data = rows(MULTINOMIAL, np.random.RandomState(0), num_rows=80, width=4, num_outputs=3)
    theirs = LogisticRegression(C=0.5, tol=1e-10, max_iter=1000)
    theirs.fit(data.x_TD[:, :-1], data.y_TO.argmax(axis=1), sample_weight=data.weight_T)
    np.testing.assert_allclose(fitted(MULTINOMIAL, data, penalty=2.0)[:, :-1], theirs.coef_, rtol=1e-4, atol=1e-6)


def test_poisson_experts_are_poisson_regression():
    data = rows(POISSON, np.random.RandomState(0), num_rows=60, width=3, num_outputs=1)
    theirs = PoissonRegressor(alpha=2.0 / data.total, tol=1e-10, max_iter=1000)
    theirs.fit(data.x_TD[:, :-1], data.y_TO[:, 0], sample_weight=data.weight_T)
    coef_OD = fitted(POISSON, data, penalty=2.0)
    np.testing.assert_allclose(coef_OD[0, :-1], theirs.coef_, rtol=1e-5)
    np.testing.assert_allclose(coef_OD[0, -1], theirs.intercept_, rtol=1e-5)


def test_a_poisson_step_that_would_overshoot_is_halved():
    x_TD = np.ones((50, 1))
    data = Data(x_TD=x_TD, y_TO=np.full((50, 1), 1e4), weight_T=np.ones(50))
    assert fitted(POISSON, data, steps=100)[0, 0] == pytest.approx(np.log(1e4))


def test_contrasts_are_orthonormal_and_blind_to_a_constant():
    for num_outputs in (2, 3, 7):
        basis = contrasts(num_outputs)
        np.testing.assert_allclose(basis.T @ basis, np.eye(num_outputs - 1), atol=1e-12)
        np.testing.assert_allclose(basis.sum(axis=0), 0, atol=1e-12)


def test_gates_of_any_number_of_children_reach_the_optimum_that_scipy_finds():
    random = np.random.RandomState(0)
    data = rows(GAUSSIAN, random, num_rows=60, width=3, num_outputs=1)
    share_TE = random.dirichlet(np.ones(6), size=60) * data.weight_T[:, None]
    share_TA = share_TE @ UNEVEN.path_AE.T

    def objective(flat: np.ndarray) -> float:
        gate_AD = flat.reshape(9, 3)
        value = float((share_TA * log_branches(UNEVEN, gate_AD, data.x_TD)).sum())
        return -value + 0.5 * 0.3 * float((gate_AD[:, :-1] ** 2).sum())

    gate_AD = np.zeros((9, 3))
    for _ in range(20):
        gate_AD = by_newton(UNEVEN, gate_AD, data, share_TA, 0.3)
    best = minimize(objective, np.zeros(27), options={"gtol": 1e-8}).fun
    assert objective(gate_AD.ravel()) == pytest.approx(best, rel=1e-9)


def test_algorithm_2_arrives_at_once_where_logits_are_linear():
    random = np.random.RandomState(0)
    data = rows(GAUSSIAN, random, num_rows=60, width=3, num_outputs=1)
    tree, wanted_AD = Tree.full((3,)), random.normal(size=(3, 3))
    share_TA = np.exp(log_branches(tree, wanted_AD, data.x_TD))
    # log h is linear only up to its normaliser: give it a tree where that is constant.
    wanted_AD[:, :-1] = 0
    share_TA = np.exp(log_branches(tree, wanted_AD, data.x_TD))
    found_AD = by_least_squares(tree, np.zeros((3, 3)), data, share_TA * data.weight_T[:, None], 0.0)
    np.testing.assert_allclose(np.exp(log_branches(tree, found_AD, data.x_TD)), share_TA, rtol=1e-6)


def test_algorithm_2_is_a_weighted_least_squares_fit_to_the_logarithms_of_posteriors():
    random = np.random.RandomState(0)
    data = rows(GAUSSIAN, random, num_rows=40, width=3, num_outputs=1)
    tree = Tree.full((2, 2))
    share_TE = random.dirichlet(np.ones(4), size=40) * data.weight_T[:, None]
    share_TA = share_TE @ tree.path_AE.T
    found_AD = by_least_squares(tree, random.normal(size=(6, 3)), data, share_TA, 0.0)
    kept = data.weight_T > 0
    root_T = np.sqrt(share_TA[kept, 0])
    target_T = np.log(share_TA[kept, 2] / share_TA[kept, 0])
    expected_D = np.linalg.lstsq(root_T[:, None] * data.x_TD[kept], root_T * target_T, rcond=None)[0]
    np.testing.assert_allclose(found_AD[2], expected_D, rtol=1e-5)
