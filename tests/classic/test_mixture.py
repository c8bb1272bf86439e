"""The model itself: the reference's numbers by hand, and what must hold of gates and posteriors."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from moesaic.classic.data import Data
from moesaic.classic.expert import LinearExperts
from moesaic.classic.family import BERNOULLI, GAUSSIAN, MULTINOMIAL, POISSON
from moesaic.classic.gate import log_branches, posterior_branches, through_gates
from moesaic.classic.mixture import Mixture
from moesaic.classic.tree import Tree
from tests.classic.problems import FAMILIES, mixture, rows
from tests.classic.test_tree import UNEVEN

ONE = np.ones((1, 1))
"""An input that is the constant alone."""


def test_posteriors_of_two_levels_are_those_worked_out_by_hand():
    """g = (.6, .4), g_{j|1} = (.5, .5), g_{j|2} = (.9, .1), P = ((.2, .4), (.1, .8))."""
    share_A = np.array([0.6, 0.4, 0.5, 0.5, 0.9, 0.1])
    chance_E = np.array([0.2, 0.4, 0.1, 0.8])
    model = Mixture(
        tree=Tree.full((2, 2)),
        gate_AD=np.log(share_A)[:, None],
        experts=LinearExperts(np.log(chance_E / (1 - chance_E))[:, None, None]),
        family=BERNOULLI,
        dispersion_EO=np.ones((4, 1)),
    )
    posterior_TE, loglik_T = model.posterior(ONE, ONE)
    branches = posterior_branches(model.tree, posterior_TE)[0]
    assert np.exp(loglik_T[0]) == pytest.approx(0.248)
    assert branches[:2] == pytest.approx([0.7258, 0.2742], abs=5e-5)
    assert branches[2] / branches[0] == pytest.approx(0.3333, abs=5e-5)
    assert branches[4] / branches[1] == pytest.approx(0.5294, abs=5e-5)
    assert posterior_TE[0, 0] == pytest.approx(0.2419, abs=5e-5)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_gates_and_posteriors_sum_to_one(family):
    random = np.random.RandomState(0)
    model = mixture(family, UNEVEN, random, width=3, num_outputs=2)
    data = rows(family, random, num_rows=20, width=3, num_outputs=2)
    share_TA = np.exp(log_branches(UNEVEN, model.gate_AD, data.x_TD))
    np.testing.assert_allclose(np.add.reduceat(share_TA, UNEVEN.start_G, axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.exp(model.log_gate(data.x_TD)).sum(axis=1), 1, rtol=1e-12)
    posterior_TE, _ = model.posterior(data.x_TD, data.y_TO)
    np.testing.assert_allclose(posterior_TE.sum(axis=1), 1, rtol=1e-12)
    posterior_TA = posterior_branches(UNEVEN, posterior_TE)
    np.testing.assert_allclose(posterior_TA[:, 2:5].sum(axis=1), posterior_TA[:, 0], rtol=1e-12)


def test_gates_do_not_overflow():
    gate_AD = np.array([[1e5], [-1e5]])
    assert log_branches(Tree.full((2,)), gate_AD, ONE).tolist() == [[0.0, -2e5]]


def test_what_all_experts_gain_alike_moves_no_gate():
    random = np.random.RandomState(0)
    log_branch_TA = log_branches(UNEVEN, random.normal(size=(9, 3)), random.normal(size=(5, 3)))
    moved_TA = through_gates(UNEVEN, log_branch_TA, np.exp(log_branch_TA @ UNEVEN.path_AE))
    np.testing.assert_allclose(moved_TA, 0, atol=1e-12)
    d_TA = through_gates(UNEVEN, log_branch_TA, random.normal(size=(5, 6)))
    np.testing.assert_allclose(np.add.reduceat(d_TA, UNEVEN.start_G, axis=1), 0, atol=1e-12)


def test_the_density_of_gaussian_experts_is_scipy_s():
    random = np.random.RandomState(0)
    model = mixture(GAUSSIAN, UNEVEN, random, width=3, num_outputs=2)
    data = rows(GAUSSIAN, random, num_rows=4, width=3, num_outputs=2)
    gate_TE, mean_TEO = np.exp(model.log_gate(data.x_TD)), model.means(data.x_TD)
    _, loglik_T = model.posterior(data.x_TD, data.y_TO)
    for row in range(4):
        density = sum(
            gate_TE[row, e] * multivariate_normal(mean_TEO[row, e], np.diag(model.dispersion_EO[e])).pdf(data.y_TO[row])
            for e in range(6)
        )
        assert np.exp(loglik_T[row]) == pytest.approx(density)


@pytest.mark.parametrize("family", [BERNOULLI, MULTINOMIAL, POISSON], ids=lambda family: family.name)
def test_probabilities_of_all_targets_sum_to_one(family):
    random = np.random.RandomState(0)
    num_outputs = 3 if family is MULTINOMIAL else 1
    model = mixture(family, Tree.full((2, 2)), random, width=3, num_outputs=num_outputs, size=0.3)
    x_TD = rows(family, random, num_rows=5, width=3, num_outputs=num_outputs).x_TD
    every = {"bernoulli": [[0.0], [1.0]], "multinomial": np.eye(3), "poisson": np.arange(60.0)[:, None]}[family.name]
    total_T = sum(np.exp(model.posterior(x_TD, np.tile(y, (5, 1)))[1]) for y in np.asarray(every))
    np.testing.assert_allclose(total_T, 1, rtol=1e-10)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_means_curvatures_and_scores_are_derivatives(family):
    random = np.random.RandomState(0)
    eta_TEO, step = random.normal(size=(4, 3, 2)), 1e-6
    shift = step * np.eye(2)[0]
    slope = (family.log_partition(eta_TEO + shift) - family.log_partition(eta_TEO - shift)) / (2 * step)
    mean_TEO = family.mean(eta_TEO)
    np.testing.assert_allclose(slope[..., 0], mean_TEO[..., 0], atol=1e-8)
    bend = (family.mean(eta_TEO + shift) - family.mean(eta_TEO - shift)) / (2 * step)
    np.testing.assert_allclose(bend[..., 0], family.curvature(mean_TEO)[..., 0], atol=1e-8)
    y_TO = rows(family, random, num_rows=4, width=2, num_outputs=2).y_TO
    dispersion_EO = np.ones((3, 2))
    risen, fallen = (family.loglik(y_TO, eta_TEO + sign * shift, dispersion_EO) for sign in (1, -1))
    np.testing.assert_allclose(
        (risen - fallen) / (2 * step), family.score(y_TO, mean_TEO, dispersion_EO)[..., 0], atol=1e-7
    )
    np.testing.assert_allclose(family.mean(family.link(mean_TEO)), mean_TEO, rtol=1e-12)


def test_an_expert_that_is_renamed_changes_nothing():
    random = np.random.RandomState(0)
    model = mixture(GAUSSIAN, Tree.full((4,)), random, width=3, num_outputs=2)
    data: Data = rows(GAUSSIAN, random, num_rows=9, width=3, num_outputs=2)
    order = np.array([2, 0, 3, 1])
    renamed = Mixture(
        tree=model.tree,
        gate_AD=model.gate_AD[order],
        experts=model.experts.take(order),
        family=GAUSSIAN,
        dispersion_EO=model.dispersion_EO[order],
    )
    np.testing.assert_allclose(renamed.mean(data.x_TD), model.mean(data.x_TD), rtol=1e-12)
    posterior_TE, loglik_T = model.posterior(data.x_TD, data.y_TO)
    of_renamed_TE, of_renamed_T = renamed.posterior(data.x_TD, data.y_TO)
    np.testing.assert_allclose(of_renamed_TE, posterior_TE[:, order], rtol=1e-12)
    np.testing.assert_allclose(of_renamed_T, loglik_T, rtol=1e-12)
