import math

import pytest
import torch

from moesaic import ConfigError
from moesaic.balance import entropy_loss
from moesaic.routers import TopPRouter


def _on(probabilities: list[list[float]], p: float, top_k: int | None = None) -> TopPRouter:
    """A router whose token t has the t-th row of probabilities."""
    rows = torch.tensor(probabilities, dtype=torch.float64)
    router = TopPRouter(rows.shape[0], rows.shape[1], p=p, top_k=top_k).double()
    with torch.no_grad():
        router.weight.copy_(rows.log().t())
    return router


def _route(probabilities: list[list[float]], p: float, top_k: int | None = None):
    router = _on(probabilities, p, top_k)
    return router(torch.eye(len(probabilities), dtype=torch.float64))


@pytest.mark.parametrize(
    ("p", "experts", "weights"),
    [
        (1e-9, [0], [0.5]),
        (0.4, [0], [0.5]),
        (0.6, [0, 1], [0.5, 0.3]),
        (0.85, [0, 1, 2], [0.5, 0.3, 0.1]),
        (1.0, [0, 1, 2, 3], [0.5, 0.3, 0.1, 0.1]),
    ],
)
def test_the_worked_examples(p, experts, weights):
    """Reference 19: raw probabilities, the crossing expert included."""
    routing = _route([[0.5, 0.3, 0.1, 0.1]], p)
    assert routing.expert_N.tolist() == experts
    assert routing.weight_N.tolist() == pytest.approx(weights)


def test_an_undecided_token_takes_7_of_16_experts_at_the_published_p():
    """Reference 19: 6/16 = 0.375 falls short of 0.4."""
    routing = _route([[1 / 16] * 16], 0.4)
    assert routing.expert_N.tolist() == list(range(7))
    assert TopPRouter(4, 16, p=0.4).experts_per_token == 7
    assert float(entropy_loss(routing).detach()) == pytest.approx(2.7726, abs=1e-4)


def test_what_crosses_exactly_is_enough():
    assert _route([[0.5, 0.25, 0.25]], 0.5).num_rows == 1
    assert _route([[0.5, 0.25, 0.25]], 0.75).num_rows == 2


def test_experts_never_become_fewer_as_p_rises_and_weights_add_up_to_between_p_and_1():
    x_TD = torch.randn(50, 6, dtype=torch.float64)
    router = TopPRouter(6, 9).double()
    torch.nn.init.normal_(router.weight, std=0.7)
    before_T = torch.zeros(50)
    for p in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0):
        router.p = p
        routing = router(x_TD)
        number_T = torch.bincount(routing.token_N, minlength=50)
        assert (number_T >= before_T).all()
        assert number_T.max() <= router.experts_per_token
        sum_T = torch.zeros(50, dtype=torch.float64).index_add(0, routing.token_N, routing.weight_N.detach())
        assert (sum_T >= p - 1e-12).all()
        assert (sum_T <= 1 + 1e-12).all()
        before_T = number_T
    assert (before_T == 9).all()


def test_a_bound_keeps_the_best():
    routing = _route([[0.3, 0.4, 0.2, 0.1], [0.97, 0.01, 0.01, 0.01]], 0.9, top_k=2)
    assert list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)) == [(0, 1), (0, 0), (1, 0)]
    assert TopPRouter(4, 16, p=0.4, top_k=3).experts_per_token == 3
    assert TopPRouter(4, 16, p=0.1, top_k=3).experts_per_token == 2


@pytest.mark.parametrize(("p", "num_experts", "most"), [(0.07, 100, 7), (0.4, 5, 2), (1.0, 3, 3), (0.01, 3, 1)])
def test_the_most_that_a_token_visits_is_not_blurred_by_rounding(p, num_experts, most):
    assert TopPRouter(4, num_experts, p=p).experts_per_token == most


def test_p_of_1_keeps_experts_whose_probability_rounds_away():
    router = TopPRouter(1, 3, p=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0], [60.0], [-500.0]]))
    assert router(torch.ones(1, 1)).expert_N.tolist() == [1, 0, 2]


def test_selection_is_the_same_under_autocast():
    router, x_TD = TopPRouter(32, 40, p=0.5), torch.randn(64, 32)
    torch.nn.init.normal_(router.weight, std=0.2)
    plain = router(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x_TD)
    assert torch.equal(plain.expert_N, cast.expert_N)
    assert torch.equal(plain.weight_N, cast.weight_N)
    assert cast.weight_N.dtype == torch.float32


@pytest.mark.parametrize("p", [0.0, -0.5, 1.5])
def test_a_p_that_no_sum_can_mean_is_refused(p):
    with pytest.raises(ConfigError) as error:
        TopPRouter(4, 8, p=p)
    assert str(error.value) == f"p must be above 0 and at most 1, got {p}. Huang et al. use 0.4."


def test_a_bound_beyond_all_experts_is_refused():
    with pytest.raises(ConfigError, match="top_k must be between 1 and num_experts=8, got 9"):
        TopPRouter(4, 8, top_k=9)


def test_a_lone_expert_still_trains_the_router():
    router = TopPRouter(6, 4, p=1e-6)
    torch.nn.init.normal_(router.weight, std=0.5)
    router(torch.randn(9, 6)).weight_N.sum().backward()
    assert router.weight.grad.abs().max() > 1e-3
    assert math.isfinite(float(router.weight.grad.sum()))
