"""Ways to cut neurons: every neuron once, sizes equal, and each way does what it says."""

import itertools

import pytest
import torch

from moesaic.convert.layout.dense import hidden_of
from moesaic.convert.weights.partition import (
    by_chance,
    by_company,
    by_importance,
    by_weights,
    grouped,
    importance,
    token_groups,
    weight_importance,
)
from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.errors import ConfigError
from moesaic.kernels.activations import relu, silu

D, F = 8, 24


def network(gated=True):
    return DenseFFN(gate_DF=torch.randn(D, F) if gated else None, up_DF=torch.randn(D, F), down_FD=torch.randn(F, D))


def ways(num_experts, seed=0):
    ffn, x_TD = network(), torch.randn(60, D)
    hidden_TF = hidden_of(ffn, x_TD, silu)
    yield "random", by_chance(F, num_experts, seed)
    yield from (
        (f"cluster {rows} {cosine}", by_weights(ffn, num_experts, seed, rows=rows, cosine=cosine))
        for rows in ("up", "gate")
        for cosine in (False, True)
    )
    yield "coactivation", by_company(hidden_TF, num_experts, seed)
    groups = token_groups(x_TD, num_experts, seed)
    yield "importance", by_importance(importance(ffn, hidden_TF, groups, num_experts))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8, 24])
def test_every_way_puts_each_neuron_in_one_expert_and_makes_experts_equal(num_experts):
    for way, neuron_EF in ways(num_experts):
        assert neuron_EF.shape == (num_experts, F // num_experts), way
        assert neuron_EF.flatten().sort().values.tolist() == list(range(F)), way
        assert torch.equal(neuron_EF, neuron_EF.sort(dim=1).values), way


def test_a_seed_gives_one_answer():
    for seed in (0, 1):
        torch.manual_seed(5)
        first = dict(ways(4, seed))
        torch.manual_seed(5)
        assert all(torch.equal(neuron_EF, first[way]) for way, neuron_EF in ways(4, seed))
    assert not torch.equal(by_chance(F, 4, 0), by_chance(F, 4, 1))


def test_an_uneven_cut_is_refused():
    with pytest.raises(ConfigError, match="24 neurons cannot be cut into 5 equal groups"):
        by_chance(F, 5, 0)


def planted(num_experts=3):
    """A network in which neuron i reads direction i % E, and tokens that lie along one direction each."""
    torch.manual_seed(3)
    kind_F = torch.arange(F) % num_experts
    direction_ED = torch.linalg.qr(torch.randn(D, D)).Q[:num_experts]
    up_DF = direction_ED[kind_F].T * (1 + torch.rand(F)) + 0.02 * torch.randn(D, F)
    ffn = DenseFFN(gate_DF=None, up_DF=up_DF, down_FD=torch.randn(F, D))
    kind_T = torch.arange(90) % num_experts
    x_TD = direction_ED[kind_T] * (1 + torch.rand(90, 1)) + 0.02 * torch.randn(90, D)
    return ffn, x_TD, kind_F


def as_sets(neuron_EF):
    return {frozenset(row) for row in neuron_EF.tolist()}


def test_neurons_that_belong_together_are_found_by_weights_by_company_and_by_importance():
    ffn, x_TD, kind_F = planted()
    truth = as_sets(grouped(kind_F))
    hidden_TF = hidden_of(ffn, x_TD, relu)
    assert as_sets(by_weights(ffn, 3, 0)) == truth
    assert as_sets(by_weights(ffn, 3, 0, cosine=True)) == truth
    assert as_sets(by_company(hidden_TF, 3, 0, share=1 / 3)) == truth
    groups = token_groups(x_TD, 3, 0)
    assert as_sets(by_importance(importance(ffn, hidden_TF, groups, 3))) == truth
    assert as_sets(by_chance(F, 3, 0)) != truth


def test_company_cuts_the_fewest_edges_of_the_graph():
    ffn, x_TD, kind_F = planted()
    hidden_TF = hidden_of(ffn, x_TD, relu)
    active_TF = torch.zeros_like(hidden_TF).scatter_(1, hidden_TF.topk(8, dim=1).indices, 1.0)
    edge = (active_TF.T @ active_TF).fill_diagonal_(0)

    def cut(neuron_EF):
        inside = sum(edge[row][:, row].sum() for row in neuron_EF)
        return float(edge.sum() - inside) / 2

    best = cut(by_company(hidden_TF, 3, 0, share=1 / 3))
    assert best == cut(grouped(kind_F))
    assert all(best < cut(by_chance(F, 3, seed)) for seed in range(5))


def test_neurons_that_are_silent_on_a_token_are_not_active_on_it():
    hidden_TF = torch.zeros(4, F)
    hidden_TF[:, :2] = 1.0
    assert by_company(hidden_TF, 12, 0, share=0.5).shape == (12, 2)
    assert [0, 1] in by_company(hidden_TF, 12, 0, share=0.5).tolist()


def test_importance_is_the_length_of_what_would_be_missing():
    ffn, x_TD = network(), torch.randn(5, D)
    hidden_TF = hidden_of(ffn, x_TD, silu)
    whole_TD = hidden_TF @ ffn.down_FD
    for neuron in (0, 7):
        without_TF = hidden_TF.clone()
        without_TF[:, neuron] = 0
        missing = (whole_TD - without_TF @ ffn.down_FD).norm(dim=1)
        groups = torch.tensor([0, 0, 1, 1, 1])
        found_EF = importance(ffn, hidden_TF, groups, 3)
        torch.testing.assert_close(found_EF[0, neuron], missing[:2].mean())
        torch.testing.assert_close(found_EF[1, neuron], missing[2:].mean())
        torch.testing.assert_close(importance(ffn, hidden_TF)[0, neuron], missing.mean())
        assert found_EF[2, neuron] == 0


def test_the_sum_of_importances_is_the_greatest_that_there_is():
    torch.manual_seed(0)
    importance_EF = torch.rand(2, 8, dtype=torch.float64)
    neuron_EF = by_importance(importance_EF)
    found = sum(float(importance_EF[e, row].sum()) for e, row in enumerate(neuron_EF))
    best = max(
        float(importance_EF[0, list(some)].sum() + importance_EF[1, [i for i in range(8) if i not in some]].sum())
        for some in itertools.combinations(range(8), 4)
    )
    assert found == pytest.approx(best)


def test_with_overlap_each_expert_takes_its_best():
    importance_EF = torch.tensor([[9.0, 8, 1, 2], [9.0, 1, 7, 2]])
    assert by_importance(importance_EF, overlap=True).tolist() == [[0, 1], [0, 2]]
    assert by_importance(importance_EF, overlap=True, hidden=3).tolist() == [[0, 1, 3], [0, 2, 3]]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: by_importance(torch.rand(2, 8), hidden=3), "hidden is for experts that may overlap"),
        (lambda: by_importance(torch.rand(2, 8), hidden=9, overlap=True), "hidden must be from 1 to the network's 8"),
        (
            lambda: by_weights(network(gated=False), 2, 0, rows="gate"),
            "rows must be 'up' for this network, got 'gate'.",
        ),
        (lambda: by_weights(network(), 2, 0, rows="down"), "rows must be 'up' or 'gate' for this network, got 'down'."),
        (lambda: by_company(torch.rand(4, 8), 2, 0, share=1.5), "share must be above 0 and below 1, got 1.5."),
        (lambda: token_groups(torch.rand(3, 8), 4, 0), "3 tokens cannot be cut into 4 groups. Give more text."),
    ],
)
def test_what_cannot_be_cut_is_refused(act, message):
    with pytest.raises(ConfigError) as error:
        act()
    assert message in str(error.value)


def test_tokens_left_over_join_the_nearest_group():
    x_TD = torch.tensor([[0.0], [10.0], [0.1], [10.1], [9.0]])
    assert token_groups(x_TD, 2, 0).tolist() == [0, 1, 0, 1, 1]


def test_weights_alone_tell_what_a_neuron_may_do():
    ffn = network()
    loud = DenseFFN(
        gate_DF=ffn.gate_DF, up_DF=ffn.up_DF, down_FD=ffn.down_FD * torch.tensor([9.0] + [1.0] * 23)[:, None]
    )
    torch.testing.assert_close(weight_importance(loud)[0], 9 * weight_importance(ffn)[0])
    torch.testing.assert_close(weight_importance(loud)[1:], weight_importance(ffn)[1:])
    assert weight_importance(network(gated=False)).shape == (F,)
