"""EM never lowers what it climbs, whatever the tree, the family, the noise and the data."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.classic.data import Data
from moesaic.classic.em import EM
from moesaic.classic.family import GAUSSIAN, MULTINOMIAL
from moesaic.classic.gate import by_least_squares
from moesaic.classic.mixture import Mixture
from moesaic.classic.noise import Noise
from moesaic.classic.tree import Tree
from tests.classic.problems import FAMILIES, mixture, rows
from tests.classic.test_tree import UNEVEN

TREES = [Tree.full(branching) for branching in ((), (2,), (5,), (2, 2), (3, 2), (2, 2, 2))] + [UNEVEN]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Mixture, Data, EM]:
    """A mixture and rows that have nothing to do with it: some come twice, columns depend on others or are huge."""
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    width, num_outputs = draw(st.integers(1, 5)), draw(st.integers(2 if family is MULTINOMIAL else 1, 3))
    random = np.random.RandomState(draw(st.integers(0, 2**31)))
    hidden = draw(st.sampled_from([None, None, None, 2]))
    tree = draw(st.sampled_from(TREES))
    model = mixture(
        family,
        tree,
        random,
        width=width,
        num_outputs=num_outputs,
        hidden=hidden,
        size=draw(st.sampled_from([0.1, 1, 5])),
    )
    data = rows(family, random, num_rows=draw(st.sampled_from([1, 2, 7, 40])), width=width, num_outputs=num_outputs)
    if width > 2 and draw(st.booleans()):
        data.x_TD[:, 0] = data.x_TD[:, 1]
    if width > 1 and draw(st.booleans()):
        data.x_TD[:, 0] *= 1e6
    if draw(st.booleans()):
        data = data.rows(random.randint(len(data.x_TD), size=len(data.x_TD)))
        data.weight_T[0] = 1.0
    kind = draw(st.sampled_from(["fixed", "shared", "expert"])) if family is GAUSSIAN else "fixed"
    noise = Noise(kind=kind, floor_O=np.full(num_outputs, 1e-3))
    return model, data, EM(noise=noise, penalty=draw(st.sampled_from([0.0, 0.01, 1.0])))


@settings(max_examples=200)
@given(problems())
def test_no_pass_lowers_the_likelihood(problem):
    model, data, em = problem
    if em.noise.kind == "shared":
        model.dispersion_EO[:] = model.dispersion_EO[0]
    curve = [value for _, value in islice(em.passes(model, data), 12)]
    assert np.isfinite(curve).all()
    for before, after in pairwise(curve):
        assert after >= before - 1e-8 * max(1.0, abs(before))


def test_with_hard_gates_experts_do_not_see_each_other():
    random = np.random.RandomState(0)
    data = rows(GAUSSIAN, random, num_rows=60, width=3, num_outputs=1)
    model = mixture(GAUSSIAN, Tree.full((2,)), random, width=3, num_outputs=1)
    theirs_T = data.x_TD[:, 0] > 0
    posterior_TE = np.stack([theirs_T, ~theirs_T], axis=1).astype(float)
    em = EM(noise=Noise(kind="fixed", floor_O=np.ones(1)))
    coef_EOD = em.maximized(model, data, posterior_TE).experts.arrays[0]
    for expert, mine_T in enumerate((theirs_T, ~theirs_T)):
        root_T1 = np.sqrt(data.weight_T[mine_T])[:, None]
        alone = np.linalg.lstsq(root_T1 * data.x_TD[mine_T], root_T1 * data.y_TO[mine_T], rcond=None)[0]
        np.testing.assert_allclose(coef_EOD[expert], alone.T, rtol=1e-5, atol=1e-7)


def test_an_expert_without_rows_stays_as_it_is():
    random = np.random.RandomState(0)
    data = rows(GAUSSIAN, random, num_rows=30, width=3, num_outputs=2)
    model = mixture(GAUSSIAN, Tree.full((3,)), random, width=3, num_outputs=2)
    posterior_TE = np.tile([0.5, 0.5, 0.0], (30, 1))
    after = EM(noise=Noise(kind="expert", floor_O=np.full(2, 1e-6))).maximized(model, data, posterior_TE)
    np.testing.assert_array_equal(after.experts.arrays[0][2], model.experts.arrays[0][2])
    np.testing.assert_array_equal(after.dispersion_EO[2], model.dispersion_EO[2])


def test_noise_is_the_weighted_mean_of_squared_residuals():
    random = np.random.RandomState(0)
    y_TO, mean_TEO = random.normal(size=(9, 2)), random.normal(size=(9, 3, 2))
    share_TE = random.uniform(size=(9, 3))
    before_EO = np.ones((3, 2))
    found_EO = Noise(kind="expert", floor_O=np.zeros(2)).estimate(before_EO, y_TO, mean_TEO, share_TE)
    expected = np.average((y_TO[:, 1] - mean_TEO[:, 2, 1]) ** 2, weights=share_TE[:, 2])
    assert found_EO[2, 1] == pytest.approx(expected)
    shared_EO = Noise(kind="shared", floor_O=np.zeros(2)).estimate(before_EO, y_TO, mean_TEO, share_TE)
    mean_E = np.average(found_EO, axis=0, weights=share_TE.sum(axis=0))
    np.testing.assert_allclose(shared_EO, np.tile(mean_E, (3, 1)))
    floored_EO = Noise(kind="expert", floor_O=np.array([100.0, 0.0])).estimate(before_EO, y_TO, mean_TEO, share_TE)
    assert (floored_EO[:, 0] == 100).all()
    assert Noise(kind="fixed", floor_O=np.zeros(2)).estimate(before_EO, y_TO, mean_TEO, share_TE) is before_EO


def test_algorithm_2_may_lower_it_and_so_the_best_pass_is_kept():
    """Else there would be no reason to keep the best one; the estimators' test sees that they do."""
    random = np.random.RandomState(4)
    lowered = 0
    for _ in range(10):
        model = mixture(GAUSSIAN, Tree.full((2, 2)), random, width=3, num_outputs=1)
        data = rows(GAUSSIAN, random, num_rows=40, width=3, num_outputs=1)
        em = EM(noise=Noise(kind="expert", floor_O=np.full(1, 1e-3)), gates=by_least_squares)
        curve = np.array([value for _, value in islice(em.passes(model, data), 20)])
        lowered += bool((np.diff(curve) < -1e-6).any())
    assert lowered
