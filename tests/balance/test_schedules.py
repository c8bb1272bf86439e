import itertools
from dataclasses import replace

import pytest
import torch

from moesaic import ConfigError, MoELayer, ShapeError
from moesaic.balance import (
    AnnealingController,
    AnnealingRule,
    LossTerm,
    SparsityController,
    SparsityRule,
    l1_loss,
)
from moesaic.experts import MLPExperts
from moesaic.routers import AnnealedRouter, Cooling, ReLURouter, TopKRouter


def _layers(number: int = 2, num_experts: int = 4, top_k: int = 1, coefficient: float | None = 1e-3) -> list[MoELayer]:
    return [
        MoELayer(ReLURouter(6, num_experts, top_k=top_k), MLPExperts(num_experts, 6, 3), coefficient=coefficient)
        for _ in range(number)
    ]


@pytest.mark.parametrize(
    ("loads", "factor"),
    [
        ([10, 10, 10, 10, 10, 10, 10, 10], 1.2),  # 4 of 4 active where 1 is wished: too dense
        ([3, 3, 2, 3, 3, 2, 3, 2], 1.2),  # 21 rows, wished 20
        ([5, 5, 5, 5, 0, 0, 0, 0], 1.0),  # one layer is too dense by what the other is too sparse
        ([3, 2, 3, 2, 3, 2, 2, 2], 1 / 1.2),  # 19 rows
        ([0, 0, 0, 0, 0, 0, 0, 0], 1 / 1.2),
    ],
)
def test_the_one_coefficient_follows_the_sparsity_of_all_layers(loads, factor):
    """Reference 21.4: 10 tokens, two layers of four experts, one wished."""
    layers = _layers()
    (controller,) = SparsityRule().build(layers)
    controller.step(torch.tensor(loads), num_tokens=20)
    for layer in layers:
        assert float(layer.coefficient) == pytest.approx(1e-3 * factor, rel=1e-6)
        assert layer.coefficient.dtype == torch.float32
    assert float(layers[0].coefficient) == float(layers[1].coefficient)


def test_layers_of_different_sizes_count_by_their_experts():
    layers = [*_layers(1, num_experts=2, top_k=1), *_layers(1, num_experts=6, top_k=3)]
    controller = SparsityController(layers)
    controller.step(torch.tensor([10, 10, 10, 10, 0, 0, 0, 0]), num_tokens=20)  # 4 of 8 wished, 4 active
    assert float(layers[0].coefficient) == pytest.approx(1e-3)
    controller.step(torch.tensor([10, 10, 10, 10, 1, 0, 0, 0]), num_tokens=20)
    assert float(layers[1].coefficient) == pytest.approx(1.2e-3)


def test_a_layer_that_was_loaded_otherwise_is_brought_back_to_the_first():
    layers = _layers()
    layers[1].coefficient.fill_(5.0)
    SparsityController(layers).step(torch.full((8,), 10), num_tokens=20)
    assert float(layers[1].coefficient) == float(layers[0].coefficient) == pytest.approx(1.2e-3)


def test_the_coefficient_neither_dies_at_0_nor_reaches_infinity():
    layers = _layers(coefficient=1e-37)
    controller = SparsityController(layers, factor=10.0)
    for _ in range(20):
        controller.step(torch.zeros(8, dtype=torch.int64), num_tokens=20)
    assert float(layers[0].coefficient) > 0
    for _ in range(200):
        controller.step(torch.full((8,), 10), num_tokens=20)
    assert layers[0].coefficient.isfinite()


def test_a_step_without_tokens_moves_nothing():
    layers = _layers()
    SparsityController(layers).step(torch.zeros(8, dtype=torch.int64), num_tokens=0)
    assert float(layers[0].coefficient) == pytest.approx(1e-3)


def test_the_coefficient_survives_a_cast_and_is_saved():
    layers = _layers(coefficient=1e-8)
    controller = SparsityController([layer.bfloat16() for layer in layers])
    for _ in range(30):
        controller.step(torch.full((8,), 10), num_tokens=20)
    assert float(layers[0].coefficient) == pytest.approx(1e-8 * 1.2**30, rel=1e-5)
    other = _layers(1)[0].bfloat16()
    other.load_state_dict(layers[1].state_dict())
    assert float(other.coefficient) == float(layers[0].coefficient)


def test_it_brings_a_router_to_the_wished_number_of_experts_and_keeps_it_there():
    """Reference 21.4: mean active experts go to k, and the coefficient swings about a fixed point by 1.2."""
    layers = _layers(number=2, num_experts=8, top_k=2, coefficient=1e-4)
    term = LossTerm(name="l1", loss=l1_loss, coefficient=1.0, adaptive=True)
    (controller,) = SparsityRule().build(layers)
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.router.parameters()], lr=2.0)
    x_TD, wished_TE = torch.randn(128, 6), torch.randn(128, 8)
    # A part common to all tokens: about the origin, every direction has half of them on its side whatever one does.
    x_TD[:, 0] = 1
    active, coefficients = [], []
    for _ in range(300):
        tables = [layer.router(x_TD) for layer in layers]
        tables = [replace(t, extras={**t.extras, "coefficient": layers[0].coefficient.clone()}) for t in tables]
        loss = sum((table.logits_TE - wished_TE).square().mean() + term(table) for table in tables)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        load_E = torch.cat([table.load_E for table in tables])
        controller.step(load_E, num_tokens=2 * 128)
        active.append(int(load_E.sum()) / 256)
        coefficients.append(float(layers[0].coefficient))
    assert active[0] > 3.5
    assert sum(active[-100:]) / 100 == pytest.approx(2, abs=0.2)
    assert 1 < max(coefficients[-100:]) / min(coefficients[-100:]) < 1.2**4
    steps = {round(after / before, 3) for before, after in itertools.pairwise(coefficients)}
    assert steps <= {1.2, 1.0, 0.833}


@pytest.mark.parametrize("shape", [(4,), (9,), (2, 4)])
def test_loads_of_another_number_of_experts_are_refused(shape):
    with pytest.raises(ShapeError) as error:
        SparsityController(_layers()).step(torch.ones(shape), num_tokens=20)
    assert str(error.value) == (
        f"load_E must have one entry for each of 8 experts of 2 layers, got shape {shape}. "
        "Lay the loads of all layers end to end."
    )


def test_a_step_must_say_how_many_tokens_there_were():
    with pytest.raises(ConfigError) as error:
        SparsityController(_layers()).step(torch.ones(8))
    assert str(error.value) == (
        "SparsityController needs num_tokens to know what share of experts is active, got None. "
        "Pass the tokens of the step, summed over layers."
    )


def test_a_layer_without_a_coefficient_is_refused():
    with pytest.raises(ConfigError) as error:
        SparsityRule().build(_layers(coefficient=None))
    assert str(error.value) == (
        "SparsityController needs layers with a coefficient, got MoELayer without one. "
        "Build the layer with coefficient=1e-8."
    )


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_factor_that_does_not_raise_is_refused(factor):
    with pytest.raises(ConfigError) as error:
        SparsityController(_layers(), factor=factor)
    assert str(error.value) == f"factor must be above 1, got {factor}. ReMoE uses 1.2."


def test_no_layer_at_all_is_refused_by_the_controller_and_nothing_to_the_rule():
    with pytest.raises(ConfigError) as error:
        SparsityController([])
    assert str(error.value) == ("SparsityController needs at least one layer, got none. Pass a model's MoE layers.")
    assert SparsityRule().build([]) == []


def test_annealing_cools_each_layer_once_per_step():
    routers = [AnnealedRouter(4, 3, cooling=Cooling(start=1.0, end=0.5, num_steps=2, kind="linear")) for _ in range(2)]
    layers = [MoELayer(router, MLPExperts(3, 4, 2)) for router in routers]
    controllers = AnnealingRule().build(layers)
    assert len(controllers) == 2
    controllers[0].step(torch.zeros(3))
    assert [float(router.temperature) for router in routers] == [0.75, 1.0]
    controllers[0].step(torch.zeros(3), kept_E=torch.zeros(3), num_tokens=0)
    assert [float(router.temperature) for router in routers] == [0.5, 1.0]


def test_a_router_that_cannot_cool_is_refused():
    with pytest.raises(ConfigError) as error:
        AnnealingController(TopKRouter(4, 3, top_k=2))
    assert str(error.value) == ("AnnealingController needs a router that can cool, got TopKRouter. Use AnnealedRouter.")
