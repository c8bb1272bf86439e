import math

import pytest
import torch

from moesaic import Routing, recipes
from moesaic.dispatch import Capacity
from moesaic.telemetry.summary import RoutingSummary


def _routing(expert_TK, num_experts, scores_TE=None, valid_T=None) -> Routing:
    expert_TK = torch.tensor(expert_TK)
    if scores_TE is None:
        scores_TE = torch.full((expert_TK.shape[0], num_experts), 1 / num_experts)
    return Routing.from_choices(expert_TK, torch.ones(expert_TK.shape), scores_TE.log(), scores_TE, valid_T)


def test_a_summary_counts_rows_tokens_and_drops_without_padding():
    valid_T = torch.tensor([True, True, True, False])
    routing = _routing([[0, 1], [0, 1], [0, 2], [0, 1]], 3, valid_T=valid_T)
    kept_N = torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]).bool()
    summary = RoutingSummary.of(Routing(**{n: getattr(routing, n) for n in Routing.__slots__} | {"kept_N": kept_N}))
    assert summary.load_E.tolist() == [3, 2, 1]
    assert int(summary.num_tokens) == 3
    assert summary.kept_E.tolist() == [2, 1, 1]
    assert summary.num_dropped == 2
    assert summary.experts_per_token == 2
    assert summary.drop_rate == pytest.approx(2 / 6)
    assert summary.load_max_over_mean == pytest.approx(3 / 2)


def test_entropy_is_the_mean_over_tokens_in_nats():
    scores_TE = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]])
    valid_T = torch.tensor([True, True, False])
    summary = RoutingSummary.of(_routing([[0], [0], [0]], 2, scores_TE, valid_T))
    assert summary.entropy == pytest.approx(math.log(2) / 2)
    undecided = RoutingSummary.of(_routing([[0]], 16))
    assert undecided.entropy == pytest.approx(math.log(16))


def test_entropy_of_sigmoid_scores_is_that_of_their_shares():
    summary = RoutingSummary.of(_routing([[0]], 2, torch.tensor([[0.9, 0.3]])))
    assert summary.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-6)


@pytest.mark.parametrize("name", ["switch", "mixtral", "deepseek-v3", "top-p", "relu", "dense"])
def test_summaries_of_parts_add_up_to_that_of_the_whole(name):
    options = {"num_experts": 4, "top_k": 2, "init_std": 0.5}
    options = {key: value for key, value in options.items() if key in recipes.get(name).options}
    layer = recipes.get(name).layer(8, hidden=6, **options).eval()
    x_TD, valid_T = torch.randn(40, 8), torch.rand(40) > 0.3
    whole = RoutingSummary.of(layer(x_TD, valid_T)[1])
    parts = [RoutingSummary.of(layer(x_TD[s], valid_T[s])[1]) for s in (slice(0, 13), slice(13, 40))]
    added = parts[0] + parts[1]
    assert torch.equal(added.load_E, whole.load_E)
    assert int(added.num_tokens) == int(whole.num_tokens) == int(valid_T.sum())
    assert added.entropy == pytest.approx(whole.entropy)
    assert added.load_max_over_mean == whole.load_max_over_mean
    assert added.experts_per_token == whole.experts_per_token


def test_every_expert_for_every_token_is_even_and_keeps_the_entropy_of_its_weights():
    layer = recipes.get("soft-moe").layer(8, hidden=6, num_experts=4, init_std=0.5)
    summary = RoutingSummary.of(layer(torch.randn(12, 8))[1])
    assert summary.load_E.tolist() == [12] * 4
    assert summary.experts_per_token == 4
    assert (summary.load_max_over_mean, summary.drop_rate) == (1, 0)
    assert 0 < summary.entropy < math.log(4)


def test_statistics_come_from_the_router_s_own_rows_and_not_from_its_logits():
    """Trap 21."""
    scores_TE = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    assert RoutingSummary.of(_routing([[1], [1]], 2, scores_TE)).load_E.tolist() == [0, 2]


def test_the_summary_of_nothing_is_balanced_undropped_and_decided():
    summary = RoutingSummary.of(_routing([[0, 1]], 4, valid_T=torch.tensor([False])))
    assert (summary.load_max_over_mean, summary.drop_rate, summary.entropy) == (1.0, 0.0, 0.0)


def test_a_summary_keeps_no_graph_alive():
    layer = recipes.get("switch").layer(8, hidden=6, num_experts=4)
    layer.dispatch = Capacity(0.5, minimum=0)
    summary = RoutingSummary.of(layer(torch.randn(30, 8))[1])
    assert summary.drop_rate > 0
    assert not any(getattr(summary, name).requires_grad for name in RoutingSummary.__slots__)
