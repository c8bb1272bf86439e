import itertools

import pytest
import torch

from moesaic import ConfigError
from moesaic.routers import PolicyRouter

PROBABILITIES = (0.5, 0.25, 0.15, 0.1)


def _router(top_k: int) -> PolicyRouter:
    router = PolicyRouter(1, 4, top_k=top_k)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(PROBABILITIES).log()[:, None])
    return router


def test_one_draw_follows_the_softmax():
    expert_T = _router(1)(torch.ones(20_000, 1)).expert_N
    assert (torch.bincount(expert_T) / 20_000).tolist() == pytest.approx(PROBABILITIES, abs=0.012)


def test_several_draws_follow_the_softmax_of_what_is_left():
    expert_TK = _router(2)(torch.ones(40_000, 1)).expert_N.view(-1, 2)
    for first, second in itertools.permutations(range(4), 2):
        share = float(((expert_TK[:, 0] == first) & (expert_TK[:, 1] == second)).float().mean())
        expected = PROBABILITIES[first] * PROBABILITIES[second] / (1 - PROBABILITIES[first])
        assert share == pytest.approx(expected, abs=0.01)
    assert (expert_TK[:, 0] != expert_TK[:, 1]).all()


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_every_choice_weighs_the_same_and_outputs_teach_the_router_nothing(top_k):
    router = _router(top_k)
    for training in (True, False):
        routing = router.train(training)(torch.ones(5, 1))
        assert routing.weight_N.tolist() == pytest.approx([1 / top_k] * 5 * top_k)
        router.zero_grad()
        routing.weight_N.square().sum().backward()
        assert router.weight.grad.abs().max() == 0


def test_evaluation_takes_the_best_and_draws_nothing():
    router = _router(2).eval()
    state = torch.get_rng_state()
    assert router(torch.ones(7, 1)).expert_N.view(7, 2).tolist() == [[0, 1]] * 7
    assert torch.equal(torch.get_rng_state(), state)
    assert router.experts_per_token == 2


def test_the_policy_learns_from_its_probabilities_which_stay_attached():
    router = _router(1)
    routing = router(torch.ones(5, 1))
    routing.probability_TE[:, 0].sum().backward()
    assert router.weight.grad.abs().max() > 0.1


def test_more_draws_than_experts_are_refused():
    with pytest.raises(ConfigError) as error:
        PolicyRouter(4, 3, top_k=4)
    assert str(error.value) == "top_k must be between 1 and num_experts=3, got 4. Lower top_k, or add experts."
