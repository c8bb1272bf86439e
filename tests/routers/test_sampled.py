import math

import pytest
import torch

from moesaic import ConfigError
from moesaic.core.init import normal
from moesaic.routers import SampledTopKRouter, TopKRouter


def router_of(num_experts=4, top_k=2, width=5, threshold=0.5, std=0.7) -> SampledTopKRouter:
    return SampledTopKRouter(width, num_experts, top_k=top_k, threshold=threshold, init=normal(std))


def with_gates(gates: list[float], threshold: float, top_k: int = 2) -> SampledTopKRouter:
    """A router that gives the token 1 these probabilities."""
    router = router_of(len(gates), top_k, width=1, threshold=threshold)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(gates).log()[:, None])
    return router


@pytest.mark.parametrize(
    ("gates", "threshold", "chance"),
    [
        ([0.8, 0.2], 0.5, 0.4),  # reference 4.5, example 1: 2 * 0.2
        ([0.8, 0.2], 0.2, 1.0),  # Mesh TensorFlow
        ([0.95, 0.05], 0.2, 0.25),
        ([0.6, 0.15, 0.25], 0.5, 2 * 0.25 / 0.85),  # of the two together
        ([0.8, 0.2], 0.0, 1.0),
    ],
)
def test_the_second_expert_is_used_with_the_published_chance(gates, threshold, chance):
    torch.manual_seed(0)
    draws = 20_000
    routing = with_gates(gates, threshold)(torch.ones(draws, 1))
    used = (routing.num_rows - draws) / draws
    assert abs(used - chance) <= 4 * math.sqrt(chance * (1 - chance) / draws)
    assert (routing.expert_N[routing.choice_N == 0] == 0).all()


def test_a_lone_first_choice_keeps_its_own_weight():
    """Reference 4.1 and 4.4: normalised over both, before either goes."""
    torch.manual_seed(0)
    routing = with_gates([0.8, 0.2], 0.5)(torch.ones(50, 1))
    first_N = routing.choice_N == 0
    assert routing.weight_N[first_N].tolist() == pytest.approx([0.8] * 50)
    assert routing.weight_N[~first_N].tolist() == pytest.approx([0.2] * (routing.num_rows - 50))
    assert 0 < routing.num_rows - 50 < 50


def test_in_evaluation_it_is_the_plain_top_2():
    torch.manual_seed(0)
    router, x_TD = router_of().eval(), torch.randn(30, 5)
    plain = TopKRouter(5, 4, top_k=2)
    plain.load_state_dict(router.state_dict())
    state = torch.get_rng_state()
    ours, theirs = router(x_TD), plain(x_TD)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("expert_N", "token_N", "choice_N", "scores_TE"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.allclose(ours.weight_N, theirs.weight_N, atol=1e-6)


def test_one_number_is_drawn_for_each_token_and_later_choice():
    router, x_TD = router_of(top_k=3), torch.randn(9, 5)
    torch.manual_seed(3)
    router(x_TD)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.rand(9, 2)
    assert torch.equal(torch.get_rng_state(), after)


def test_later_choices_are_sampled_one_by_one():
    torch.manual_seed(0)
    routing = with_gates([0.5, 0.3, 0.2], threshold=0.6, top_k=3)(torch.ones(20_000, 1))
    share_E = routing.load_E / 20_000
    assert share_E.tolist() == pytest.approx([1.0, 0.5, 1 / 3], abs=0.015)
    both = (torch.bincount(routing.token_N) == 3).double().mean()
    assert float(both) == pytest.approx(0.5 / 3, abs=0.015)
    # Ranks have no gaps, so that a third choice without a second queues as a second.
    assert set(routing.choice_N[routing.expert_N == 2].tolist()) == {1, 2}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("logit", [1e4, -1e4, 0.0, float("-inf")])
def test_extreme_logits_give_numbers_and_numbers_as_gradients(logit, training, monkeypatch):
    router = router_of().train(training)
    leaf_TE = torch.randn(8, 4)
    leaf_TE[:, 1] = logit
    leaf_TE.requires_grad_()
    monkeypatch.setattr(SampledTopKRouter, "logits", lambda _router, _x_TD: leaf_TE * 1)
    routing = router(torch.ones(8, 5))
    routing.weight_N.square().sum().backward()
    assert routing.weight_N.isfinite().all()
    assert leaf_TE.grad.isfinite().all()


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (5, 1, 1), (5, 4, 4)])
def test_no_tokens_one_expert_and_as_many_choices_as_experts(num_tokens, num_experts, top_k):
    router = router_of(num_experts, top_k, threshold=0.0)
    routing = router(torch.randn(num_tokens, 5))
    assert routing.num_rows == num_tokens * top_k
    routing.weight_N.sum().backward()
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"top_k": 1},
            "top_k=1 needs weights that depend on the router, got a softmax over the one best expert, which is always "
            "1. Use top_k=2, or the recipe switch.",
        ),
        ({"top_k": 5}, "top_k must be between 1 and num_experts=4, got 5. Lower top_k, or add experts."),
        ({"threshold": -0.5}, "threshold must be at least 0, got -0.5. GShard uses 0.5, ST-MoE 0.2."),
    ],
)
def test_a_router_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        router_of(**options)
    assert str(error.value) == message
