"""Sums over parts of rows: the same on any number of cores, and linear algebra gets its threads back."""

import contextlib

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from moesaic.classic import HierarchicalMixtureClassifier
from moesaic.classic.cores import all_cores, summed


def blas_threads() -> set[int]:
    return {one.num_threads for one in ThreadpoolController().select(user_api="blas").lib_controllers}


@pytest.mark.parametrize("num_rows", [0, 1, 63, 64, 65, 1000])
def test_every_row_is_in_one_part(num_rows):
    seen, count = summed(num_rows, 10**9, lambda rows: (np.bincount(np.arange(1000)[rows], minlength=1000), np.ones(1)))
    np.testing.assert_array_equal(seen, np.arange(1000) < num_rows)
    assert count == max(1, -(-num_rows // 64))


def test_a_sum_has_the_same_bits_on_any_number_of_cores():
    values = np.random.RandomState(0).normal(size=100_000)

    def total() -> float:
        return float(summed(len(values), 5000, lambda rows: (values[rows].sum(keepdims=True),))[0][0])

    alone = total()
    with threadpool_limits(2, user_api="blas"), all_cores():
        assert total() == alone


def test_parts_on_other_threads_obey_the_settings_of_ours():
    with threadpool_limits(2, user_api="blas"), all_cores():
        with np.errstate(over="ignore"):
            assert summed(1000, 10**9, lambda rows: (np.exp(np.full(1, 1e4)),))[0] == np.inf
        with np.errstate(over="raise"), pytest.raises(FloatingPointError):
            summed(1000, 10**9, lambda rows: (np.exp(np.full(1, 1e4)),))


def test_linear_algebra_has_one_thread_inside_and_its_own_number_afterwards():
    with threadpool_limits(2, user_api="blas"):
        with all_cores():
            assert blas_threads() == {1}
            with all_cores():
                assert blas_threads() == {1}
            assert blas_threads() == {1}
        assert blas_threads() == {2}
        with contextlib.suppress(KeyError), all_cores():
            raise KeyError
        assert blas_threads() == {2}


def test_a_fit_does_not_depend_on_the_number_of_cores():
    random = np.random.RandomState(0)
    X = random.normal(size=(3000, 20))
    y = random.randint(3, size=3000)
    coefs = []
    for count in (1, 2):
        with threadpool_limits(count, user_api="blas"):
            model = HierarchicalMixtureClassifier((2, 2), max_iter=3, tol=0, random_state=0)
            with pytest.warns(match="still changed"):
                coefs.append(model.fit(X, y).coef_)
    np.testing.assert_allclose(*coefs, rtol=1e-9, atol=1e-12)
