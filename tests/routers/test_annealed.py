import math

import pytest
import torch

from moesaic import ConfigError
from moesaic.routers import AnnealedRouter, Cooling


def _router(num_experts: int = 6, **options) -> AnnealedRouter:
    router = AnnealedRouter(5, num_experts, **options).double()
    torch.nn.init.normal_(router.weight, std=0.6)
    return router


def _after(cooling: Cooling, step: int) -> float:
    return float(cooling.temperature(torch.tensor(step)))


@pytest.mark.parametrize("step", [0, 1, 700, 1999, 2000, 5000])
def test_temperatures_follow_the_published_formulas(step):
    """Reference 12.1."""
    numbers = {"start": 2.0, "end": 0.3, "num_steps": 2000}
    exponential = max(2.0 * math.exp(step * math.log(0.3 / 2.0) / 2000), 0.3)
    linear = max(2.0 - step * (2.0 - 0.3) / 2000, 0.3)
    assert _after(Cooling(**numbers, kind="exponential"), step) == pytest.approx(exponential, rel=1e-6)
    assert _after(Cooling(**numbers, kind="linear"), step) == pytest.approx(linear, rel=1e-6)


def test_a_router_cools_step_by_step_and_evaluation_does_not_cool_it():
    router = _router(cooling=Cooling(start=1.0, end=0.25, num_steps=4, kind="linear", hard_after=3))
    seen = []
    for _ in range(6):
        seen.append((float(router.temperature), bool(router.hard), router.experts_per_token))
        for training in (True, False):
            router.train(training)(torch.randn(4, 5, dtype=torch.float64))
        router.train().cool()
    assert seen == [
        (1.0, False, 6.0),
        (0.8125, False, 6.0),
        (0.625, False, 6.0),
        (0.4375, True, 1.0),
        (0.25, True, 1.0),
        (0.25, True, 1.0),
    ]


def test_how_far_it_has_cooled_survives_casts_and_is_saved():
    router = _router(cooling=Cooling(num_steps=1000))
    for _ in range(37):
        router.cool()
    exact = router.temperature.clone()
    other = _router(cooling=Cooling(num_steps=1000)).bfloat16()
    other.load_state_dict(router.bfloat16().state_dict())
    assert other.temperature.dtype == torch.float32
    assert torch.equal(other.temperature, exact)
    other.cool()
    router.cool()
    assert torch.equal(other.temperature, router.temperature)
    assert int(other.cooled) == 38


def test_a_hot_gate_shares_evenly_among_all_and_a_cold_one_takes_one():
    """Reference 12.1."""
    x_TD = torch.randn(50, 5, dtype=torch.float64)
    hot = _router(cooling=Cooling(start=1e6))(x_TD)
    assert hot.num_rows == 50 * 6
    assert hot.weight_N.tolist() == pytest.approx([1 / 6] * 300, rel=1e-4)
    cold = _router(cooling=Cooling(start=1e-3, end=1e-3))(x_TD)
    assert cold.num_rows < 53
    assert cold.weight_N.detach().median() == pytest.approx(1)


def test_fewer_experts_are_active_the_colder_the_gate_and_shares_never_exceed_1():
    """Reference 12.1."""
    x_TD, numbers = torch.randn(500, 5, dtype=torch.float64), []
    for temperature in (5.0, 2.0, 1.0, 0.5, 0.3, 0.1, 0.03):
        router = _router(threshold=0.02, cooling=Cooling(start=temperature, end=0.01))
        torch.manual_seed(1)
        routing = router(x_TD)
        sum_T = torch.zeros(500, dtype=torch.float64).index_add(0, routing.token_N, routing.weight_N.detach())
        assert sum_T.max() <= 1 + 1e-12
        numbers.append(routing.num_rows / 500)
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > 5.5
    assert numbers[-1] < 1.2


def test_evaluation_draws_nothing_and_takes_the_best_few_without_noise():
    router, x_TD = _router(top_k=2).eval(), torch.randn(30, 5, dtype=torch.float64)
    state = torch.get_rng_state()
    routing = router(x_TD)
    assert torch.equal(torch.get_rng_state(), state)
    shares_TE = (x_TD @ router.weight.t() / 2.0).softmax(dim=-1)
    top = shares_TE.topk(2)
    assert routing.expert_N.view(30, 2).tolist() == top.indices.tolist()
    assert torch.allclose(routing.weight_N.view(30, 2), top.values)
    assert router.experts_per_token == 2
    trained = router.train()(x_TD)
    assert not torch.equal(trained.scores_TE, routing.scores_TE)
    assert torch.equal(trained.logits_TE, routing.logits_TE)


def test_gumbel_noise_makes_the_best_expert_a_draw_from_the_softmax():
    router = AnnealedRouter(1, 3, cooling=Cooling(start=0.5))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([0.6, 0.3, 0.1]).log()[:, None])
    best_T = router(torch.ones(20_000, 1)).scores_TE.argmax(dim=-1)
    assert (torch.bincount(best_T) / 20_000).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.012)


def test_a_hard_gate_keeps_the_best_with_its_share():
    router = _router(cooling=Cooling(hard_after=0))
    x_TD = torch.randn(30, 5, dtype=torch.float64)
    for training in (True, False):
        routing = router.train(training)(x_TD)
        assert routing.token_N.tolist() == list(range(30))
        assert torch.equal(routing.expert_N, routing.scores_TE.argmax(dim=-1))
        assert (routing.weight_N < 1).all()
        assert router.experts_per_token == 1


def test_stepping_between_forward_and_backward_does_not_disturb_the_gradient():
    router = _router()
    x_TD = torch.randn(9, 5, dtype=torch.float64)
    gradients = []
    for cools in (False, True):
        router.zero_grad()
        torch.manual_seed(4)
        total = router(x_TD).weight_N.square().sum()
        if cools:
            router.cool()
        total.backward()
        gradients.append(router.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"start": 0.5, "end": 0.7},
            "the end temperature must be above 0 and at most the start of 0.5, got 0.7. "
            "EvoMoE cools from about 2 to 0.3.",
        ),
        (
            {"start": 0.5, "end": 0.0},
            "the end temperature must be above 0 and at most the start of 0.5, got 0.0. "
            "EvoMoE cools from about 2 to 0.3.",
        ),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0. EvoMoE cools for thousands."),
        ({"kind": "cosine"}, "kind must be 'exponential' or 'linear', got 'cosine'. EvoMoE has both."),
        ({"hard_after": -1}, "hard_after must be at least 0, got -1. Use None for never."),
    ],
)
def test_a_schedule_that_does_not_cool_is_refused(numbers, message):
    with pytest.raises(ConfigError) as error:
        Cooling(**numbers)
    assert str(error.value) == message


def test_a_threshold_that_no_share_can_meet_is_refused():
    with pytest.raises(ConfigError) as error:
        AnnealedRouter(5, 6, threshold=1.5)
    assert str(error.value) == "threshold must be at least 0 and less than 1, got 1.5. EvoMoE uses 0.001."
