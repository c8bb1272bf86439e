"""The three errors: the reference's numbers, how they are ordered, and every gradient against finite differences."""

from itertools import islice

import numpy as np
import pytest

from moesaic.classic.family import BERNOULLI, GAUSSIAN, MULTINOMIAL, POISSON
from moesaic.classic.gradient import Gradient
from moesaic.classic.noise import Noise
from moesaic.classic.objective import ERRORS, competitive, cooperative
from moesaic.classic.objective import mixture as mixture_error
from moesaic.classic.tree import Tree
from moesaic.core.errors import ConfigError
from tests.classic.problems import mixture, rows
from tests.classic.test_tree import UNEVEN

HALF_LOG_TAU = 0.5 * np.log(2 * np.pi)
"""What a Gaussian's density has beside the exponential that equation 3 is written with."""


def example(error):
    """p = (.5, .5), d = 1, o = (.8, −1)."""
    return error(GAUSSIAN, np.ones((1, 1)), np.log([[0.5, 0.5]]), np.array([[[0.8], [-1.0]]]), np.ones((2, 1)))


def test_the_errors_of_the_reference_s_example():
    assert example(cooperative).error_T[0] == pytest.approx(1.21)
    assert example(competitive).error_T[0] == pytest.approx(2.02)
    assert example(mixture_error).error_T[0] - HALF_LOG_TAU == pytest.approx(0.5838, abs=5e-5)
    assert example(mixture_error).responsible_TE[0] == pytest.approx([0.8787, 0.1213], abs=5e-5)


def test_who_is_moved_is_what_the_three_errors_differ_in():
    """Derivatives by the outputs: −2 p_i (d − y), −2 p_i (d − o_i), −h_i (d − o_i)."""
    assert example(cooperative).d_eta_TEO.ravel() == pytest.approx([-1.1, -1.1])
    assert example(competitive).d_eta_TEO.ravel() == pytest.approx([-0.2, -2.0])
    assert example(mixture_error).d_eta_TEO.ravel() == pytest.approx([-0.8787 * 0.2, -0.1213 * 2], abs=1e-4)


def test_with_one_expert_the_errors_are_one():
    one = (GAUSSIAN, np.array([[3.0]]), np.zeros((1, 1)), np.array([[[1.0]]]), np.ones((1, 1)))
    assert competitive(*one).error_T[0] == cooperative(*one).error_T[0] == 4.0
    assert mixture_error(*one).error_T[0] - HALF_LOG_TAU == pytest.approx(2.0)


@pytest.mark.parametrize("seed", range(20))
def test_blending_costs_no_more_than_drawing_and_the_mixture_no_more_than_half_of_that(seed):
    random = np.random.RandomState(seed)
    model = mixture(GAUSSIAN, UNEVEN, random, width=3, num_outputs=2)
    data = rows(GAUSSIAN, random, num_rows=9, width=3, num_outputs=2)
    given = (GAUSSIAN, data.y_TO, model.log_gate(data.x_TD), model.experts.eta(data.x_TD), np.ones((6, 2)))
    drawn_T = competitive(*given).error_T
    assert (cooperative(*given).error_T <= drawn_T + 1e-12).all()
    assert (mixture_error(*given).error_T - 2 * HALF_LOG_TAU <= drawn_T / 2 + 1e-12).all()


CASES = [
    (error, family, hidden, kind)
    for error in ERRORS
    for family in (GAUSSIAN, BERNOULLI, MULTINOMIAL, POISSON)
    for hidden in (None, 3)
    for kind in (("fixed", "shared", "expert") if family is GAUSSIAN and error == "mixture" else ("fixed",))
]


@pytest.mark.parametrize(("error", "family", "hidden", "kind"), CASES)
def test_gradients_are_those_of_finite_differences(error, family, hidden, kind):
    random = np.random.RandomState(0)
    model = mixture(family, UNEVEN, random, width=3, num_outputs=2, hidden=hidden, size=0.5)
    data = rows(family, random, num_rows=12, width=3, num_outputs=2)
    gradient = Gradient(error=ERRORS[error], noise=Noise(kind=kind, floor_O=np.full(2, 1e-6)), penalty=0.7)
    if kind == "shared":
        model.dispersion_EO[:] = model.dispersion_EO[0]
    flat = gradient.flat(model)
    _, found = gradient.value(flat, model, data)
    expected, step = np.empty_like(flat), 1e-6
    for number in range(len(flat)):
        moved = step * (np.arange(len(flat)) == number)
        risen, fallen = (gradient.value(flat + sign * moved, model, data)[0] for sign in (1, -1))
        expected[number] = (risen - fallen) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_parts_of_the_rows_give_together_the_gradient_of_all():
    random = np.random.RandomState(0)
    model = mixture(GAUSSIAN, Tree.full((3,)), random, width=3, num_outputs=1)
    data = rows(GAUSSIAN, random, num_rows=10, width=3, num_outputs=1)
    gradient = Gradient(error=mixture_error, noise=Noise(kind="expert", floor_O=np.ones(1)), penalty=2.0)
    flat = gradient.flat(model)
    whole, total = np.zeros_like(flat), data.total
    for some in (slice(0, 4), slice(4, 10)):
        part = data.rows(np.arange(10)[some])
        whole += gradient.value(flat, model, part, part.total / total)[1] * part.total / total
    np.testing.assert_allclose(whole, gradient.value(flat, model, data)[1], rtol=1e-10, atol=1e-12)


def test_a_learning_rate_that_is_too_large_says_so():
    random = np.random.RandomState(0)
    model = mixture(GAUSSIAN, Tree.full((2,)), random, width=3, num_outputs=1)
    data = rows(GAUSSIAN, random, num_rows=30, width=3, num_outputs=1)
    noise = Noise(kind="fixed", floor_O=np.ones(1))
    passes = Gradient(error=competitive, noise=noise, learning_rate=500.0).passes(model, data, random)
    with np.errstate(all="ignore"), pytest.raises(ConfigError) as error:
        list(islice(passes, 1000))
    assert str(error.value).endswith(
        "with learning_rate=500.0. Lower learning_rate, or take solver='lbfgs', which chooses its steps."
    )
