import pytest
import torch

from moesaic import ConfigError, MoELayer, Routing
from moesaic.balance import AdaptiveCoefficient, AdaptiveRule, LossTerm, even_gate_loss
from moesaic.dispatch import Capacity
from moesaic.experts import GatedExperts
from moesaic.routers import NormalizedRouter


def layer_with(coefficient: float | None = 0.01) -> MoELayer:
    router = NormalizedRouter(6, 4, top_k=2, init=lambda weight, _: torch.nn.init.normal_(weight))
    dispatch = Capacity(1.0, minimum=0)
    return MoELayer(router, GatedExperts(4, 6, 5), dispatch=dispatch, coefficient=coefficient)


def loads(num_rows: int, num_dropped: int) -> dict[str, torch.Tensor]:
    return {"load_E": torch.tensor([num_rows, 0]), "kept_E": torch.tensor([num_rows - num_dropped, 0])}


def test_a_drop_rate_of_two_percent_moves_the_coefficient_a_hundredth_of_the_way_to_0_004():
    """Reference 16.6, example 3."""
    layer = layer_with(0.01)
    AdaptiveCoefficient(layer).step(**loads(1000, 20))
    assert float(layer.coefficient) == pytest.approx(0.00994, abs=1e-9)


@pytest.mark.parametrize(("dropped", "goal"), [(0, 0.0), (20, 0.004), (50, 0.01), (300, 0.01)])
def test_the_coefficient_comes_to_rest_at_a_fifth_of_the_drop_rate_but_at_most_0_01(dropped, goal):
    """Reference 16.6, example 3."""
    layer = layer_with(0.02)
    controller = AdaptiveCoefficient(layer)
    for _ in range(1500):
        controller.step(**loads(1000, dropped))
    assert float(layer.coefficient) == pytest.approx(goal, abs=2e-5)


def test_nothing_dropped_is_what_no_count_of_kept_rows_says():
    first, second = layer_with(), layer_with()
    AdaptiveCoefficient(first).step(torch.tensor([3, 4]))
    AdaptiveCoefficient(second).step(torch.tensor([3, 4]), kept_E=torch.tensor([3, 4]))
    assert torch.equal(first.coefficient, second.coefficient)
    assert float(first.coefficient) == pytest.approx(0.0099)


def test_a_step_without_rows_moves_nothing():
    layer = layer_with()
    AdaptiveCoefficient(layer).step(torch.zeros(4, dtype=torch.int64))
    assert float(layer.coefficient) == pytest.approx(0.01)


def test_the_loss_is_multiplied_by_the_coefficient_of_its_layer_as_it_was_in_the_forward():
    layer = layer_with()
    _, routing = layer(torch.randn(40, 6))
    AdaptiveCoefficient(layer).step(**loads(100, 90))
    term = LossTerm(name="even-gate", loss=even_gate_loss, coefficient=3.0, adaptive=True)
    assert float(term(routing).detach()) == pytest.approx(0.03 * float(even_gate_loss(routing).detach()), rel=1e-6)


def test_the_coefficient_stays_float32_under_casts_and_is_saved():
    layer = layer_with().bfloat16()
    (controller,) = AdaptiveRule(xi=0.1, alpha_max=0.02, beta=0.5).build([layer])
    controller.step(**loads(1000, 100))
    assert layer.coefficient.dtype == torch.float32
    assert float(layer.coefficient) == pytest.approx(0.5 * 0.01 + 0.5 * 0.01)
    controller.step(**loads(1000, 123))
    other = layer_with(0.5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.coefficient, layer.coefficient)
    assert float(other.coefficient) == pytest.approx(0.5 * 0.01 + 0.5 * 0.0123)


def test_a_rule_builds_a_controller_for_each_layer():
    layers = [layer_with(), layer_with()]
    controllers = AdaptiveRule().build(layers)
    assert len(controllers) == 2
    controllers[1].step(torch.tensor([5, 5]))
    assert float(layers[0].coefficient) == pytest.approx(0.01)
    assert float(layers[1].coefficient) == pytest.approx(0.0099)


def test_a_layer_without_a_coefficient_is_refused():
    with pytest.raises(ConfigError) as error:
        AdaptiveCoefficient(layer_with(None))
    assert str(error.value) == (
        "AdaptiveCoefficient needs a layer with a coefficient, got MoELayer without one. "
        "Build the layer with coefficient=0.01."
    )


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"xi": -0.2}, "xi and alpha_max must be at least 0, got -0.2 and 0.01. Skywork-MoE uses 0.2 and 0.01."),
        ({"alpha_max": -3.0}, "xi and alpha_max must be at least 0, got 0.2 and -3.0. Skywork-MoE uses 0.2 and 0.01."),
        ({"beta": 1.0}, "beta must be at least 0 and less than 1, got 1.0. Skywork-MoE uses 0.99."),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, message):
    with pytest.raises(ConfigError) as error:
        AdaptiveCoefficient(layer_with(), **numbers)
    assert str(error.value) == message


def _routing(scores_TE: list[list[float]], valid_T: list[bool] | None = None) -> Routing:
    scores = torch.tensor(scores_TE, dtype=torch.float64).requires_grad_()
    num_tokens = len(scores_TE)
    mask = None if valid_T is None else torch.tensor(valid_T)
    expert_TK = torch.zeros(num_tokens, 1, dtype=torch.int64)
    return Routing.from_choices(expert_TK, torch.ones(num_tokens, 1), scores.log(), scores, mask)


@pytest.mark.parametrize(
    ("scores_TE", "value"),
    [
        ([[0.7, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.7], [0.2, 0.6, 0.1, 0.1], [0.1, 0.1, 0.6, 0.2]], 0.0),
        ([[1.0, 0.0, 0.0, 0.0]] * 3, 0.75),
        ([[0.5, 0.3, 0.1, 0.1]], 0.25**2 + 0.05**2 + 2 * 0.15**2),
    ],
)
def test_even_gates_cost_nothing_and_one_gate_alone_one_less_its_share(scores_TE, value):
    assert float(even_gate_loss(_routing(scores_TE)).detach()) == pytest.approx(value, abs=1e-12)


def test_padding_and_empty_batches_cost_nothing():
    padded = _routing([[0.5, 0.3, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0]], [True, False])
    alone = _routing([[0.5, 0.3, 0.1, 0.1]])
    assert float(even_gate_loss(padded).detach()) == pytest.approx(float(even_gate_loss(alone).detach()))
    nothing = even_gate_loss(_routing([[0.5, 0.3, 0.1, 0.1]], [False]))
    assert nothing == 0
    nothing.backward()
