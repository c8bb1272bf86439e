"""Trees that find their own size: no larger than rows that were held out call for."""

import numpy as np
import pytest

from moesaic.classic import HierarchicalMixtureClassifier, HierarchicalMixtureRegressor
from moesaic.core.errors import ConfigError
from tests.classic.test_classifiers import corners
from tests.classic.test_regressors import kinked


def steps(num_rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Four lines side by side."""
    random = np.random.RandomState(0)
    X = random.uniform(0, 4, size=(num_rows, 1))
    slope = np.array([1.0, -2.0, 3.0, -1.0])[X[:, 0].astype(int)]
    return X, slope * (X[:, 0] % 1) + 3 * (X[:, 0].astype(int) % 2) + 0.05 * random.normal(size=num_rows)


def test_a_tree_grows_as_far_as_held_out_rows_gain():
    X, y = steps()
    model = HierarchicalMixtureRegressor((), max_experts=12, random_state=0).fit(X, y)
    assert 4 <= model.num_experts_ <= 8
    assert model.score(X, y) > 0.95
    counts, values = model.held_out_curve_.T
    assert (np.diff(counts) == 1).all()
    assert (np.diff(values) > 0).all()
    assert counts[-1] == model.num_experts_


def test_a_line_calls_for_no_second_expert():
    X = np.random.RandomState(0).normal(size=(200, 2))
    y = X @ [1.0, 2.0] + 0.1 * np.random.RandomState(1).normal(size=200)
    assert HierarchicalMixtureRegressor((), max_experts=8, random_state=1).fit(X, y).num_experts_ <= 2


def test_what_is_not_missed_is_cut_off():
    X, y = kinked()
    model = HierarchicalMixtureRegressor((2, 2, 2), prune=True, random_state=0).fit(X, y)
    assert model.num_experts_ <= 4
    assert model.score(X, y) > 0.98
    counts, values = model.held_out_curve_.T
    assert counts[0] == 8
    assert (np.diff(counts) == -1).all()
    assert (np.diff(values) >= 0).all()


def test_it_never_grows_beyond_what_was_allowed():
    X, y = steps()
    assert HierarchicalMixtureRegressor((2,), max_experts=3, random_state=0).fit(X, y).num_experts_ <= 3
    assert HierarchicalMixtureRegressor((2, 2), max_experts=3, random_state=0).fit(X, y).num_experts_ == 4


def test_classifiers_grow_too_and_can_be_grown_then_cut():
    X, y = corners()
    model = HierarchicalMixtureClassifier((), max_experts=6, prune=True, random_state=0).fit(X, y)
    assert model.num_experts_ >= 2
    assert model.score(X, y) > 0.9


def test_held_out_density_is_in_the_user_s_units():
    X, y = kinked()
    plain = HierarchicalMixtureRegressor((), max_experts=2, random_state=0).fit(X, y).held_out_curve_
    other = HierarchicalMixtureRegressor((), max_experts=2, random_state=0).fit(X, 100 * y).held_out_curve_
    np.testing.assert_allclose(plain[:, 1] - other[:, 1], np.log(100), rtol=1e-6)


def test_too_few_rows_to_hold_any_out():
    with pytest.raises(ConfigError) as error:
        HierarchicalMixtureRegressor((), max_experts=4).fit([[0.0], [1.0]], [0.0, 1.0])
    assert str(error.value) == (
        "A tree of its own size needs rows to fit and rows to hold out; validation_fraction=0.2 of 2 rows leaves none "
        "of one kind. Give more rows."
    )


def tariffs() -> tuple[np.ndarray, np.ndarray]:
    """A price by night and two by day, for short and for long ways."""
    random = np.random.RandomState(0)
    hour, way = random.uniform(0, 24, size=600), random.uniform(1, 20, size=600)
    price = np.where(hour < 6, 8 + 3 * way, np.where(way < 8, 4 + 2 * way, 10 + 1.2 * way))
    return np.column_stack([hour, way]), price + 0.5 * random.normal(size=600)


def test_little_luck_with_held_out_rows_is_no_reason_for_one_more_expert():
    model = HierarchicalMixtureRegressor((2,), max_experts=8, n_init=3, random_state=0).fit(*tariffs())
    assert model.num_experts_ == 3
    np.testing.assert_allclose(np.sort(model.coef_[:, 0, 1]), [1.2, 2, 3], atol=0.05)


def test_of_several_beginnings_that_grow_held_out_rows_choose_one():
    X, y = tariffs()
    ends = []
    for count in (1, 3):
        model = HierarchicalMixtureRegressor((), max_experts=4, n_init=count, random_state=5).fit(X, y)
        assert model.held_out_curve_[-1, 0] == model.num_experts_
        ends.append(model.held_out_curve_[-1, 1])
    assert ends == sorted(ends)
