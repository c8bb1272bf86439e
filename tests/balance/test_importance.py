from dataclasses import replace

import pytest
import torch

from moesaic import ConfigError, Routing
from moesaic.balance import importance_cv2, load_cv2


def routing_of(importance: list[float], **extras: torch.Tensor) -> Routing:
    """One token that gives each expert this weight."""
    weight_TK = torch.tensor([importance], dtype=torch.float64)
    routing = Routing.from_choices(torch.arange(len(importance))[None], weight_TK, weight_TK, weight_TK)
    return replace(routing, extras=extras)


def loads(*values: float) -> Routing:
    return routing_of([1.0, 1.0], smooth_load_E=torch.tensor(values, dtype=torch.float64))


def test_the_variation_of_3_and_1_is_a_quarter():
    """Reference 3.7, example 3: 0.25 with the population's variance, 0.5 with the sample's."""
    assert float(importance_cv2(routing_of([3.0, 1.0]))) == pytest.approx(0.25)
    assert float(load_cv2(loads(3.0, 1.0))) == pytest.approx(0.25)
    sample = torch.tensor([3.0, 1.0]).var() / 4
    assert float(sample) == pytest.approx(0.5)


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1.0, 7.0, 1e30])
def test_scaling_all_values_changes_nothing(factor):
    """Reference 3.7, example 3; trap 7: an epsilon in the division could be gamed."""
    assert float(importance_cv2(routing_of([3 * factor, factor, factor]))) == pytest.approx(0.32)
    assert float(load_cv2(loads(3 * factor, factor, factor))) == pytest.approx(0.32)


def test_balance_costs_nothing_and_one_expert_with_everything_costs_e_minus_1():
    assert float(importance_cv2(routing_of([2.0] * 5))) == 0
    assert float(importance_cv2(routing_of([2.0, 0.0, 0.0, 0.0]))) == pytest.approx(3.0)
    assert float(load_cv2(loads(0.0, 9.0, 0.0, 0.0))) == pytest.approx(3.0)


def test_the_gradient_takes_from_the_busy_and_gives_to_the_idle():
    weight_E = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    (grad_E,) = torch.autograd.grad(load_cv2(routing_of([1.0, 1.0], smooth_load_E=weight_E)), weight_E)
    # CV^2 = ((a - b) / (a + b))^2, so d/da = 4 b (a - b) / (a + b)^3 and d/db = -4 a (a - b) / (a + b)^3.
    assert grad_E.tolist() == pytest.approx([4 * 1 * 2 / 64, -4 * 3 * 2 / 64])


def test_padding_has_no_importance():
    scores_TE = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    routing = Routing.from_choices(
        torch.tensor([[0, 1], [0, 1]]), scores_TE, scores_TE, scores_TE, torch.tensor([True, False])
    )
    assert float(importance_cv2(routing)) == 0


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_but_padding_costs_nothing_and_stays_attached(num_tokens):
    weight_TK = torch.randn(num_tokens, 2, requires_grad=True)
    routing = Routing.from_choices(
        torch.zeros(num_tokens, 2, dtype=torch.int64),
        weight_TK,
        weight_TK,
        weight_TK,
        torch.zeros(num_tokens, dtype=torch.bool),
    )
    loss = importance_cv2(routing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert weight_TK.grad.abs().sum() == 0


def test_a_router_without_a_smooth_load_is_refused():
    with pytest.raises(ConfigError) as error:
        load_cv2(routing_of([1.0, 1.0]))
    assert str(error.value) == (
        "load_cv2 needs routing.extras['smooth_load_E'], which this routing does not have. It comes from "
        "NoisyTopKRouter and HierarchicalRouter: use the two together, or another loss."
    )
