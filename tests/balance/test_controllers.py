import pytest
import torch

from moesaic import ConfigError, ShapeError
from moesaic.balance import BiasController
from moesaic.routers import TopKRouter
from tests.oracle import balance as oracle


def _router(num_experts: int) -> TopKRouter:
    return TopKRouter(4, num_experts, top_k=2, selection_bias=True)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
@pytest.mark.parametrize("loads", [[6, 2], [5, 5, 5], [0, 0, 9, 1], [0, 0, 0], [1, 2, 3, 4, 5]])
def test_a_step_agrees_with_plain_loops(loads, rule):
    router = _router(len(loads))
    router.bias_E.copy_(torch.randn(len(loads)))
    expected = oracle.bias_step(router.bias_E.tolist(), loads, 0.01, rule)
    BiasController(router, rate=0.01, rule=rule).step(torch.tensor(loads))
    assert router.bias_E.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_step_of_the_worked_example():
    """Reference 15.5, example 3."""
    router = _router(2)
    controller = BiasController(router, rate=1e-3)
    controller.step(torch.tensor([6, 2]))
    assert router.bias_E.tolist() == pytest.approx([-1e-3, 1e-3])
    controller.step(torch.tensor([4, 4]))
    assert router.bias_E.tolist() == pytest.approx([-1e-3, 1e-3])


def test_a_common_part_of_a_step_is_taken_out():
    """One overloaded expert of four: the published step adds 2 rates in total, ours the same differences and 0."""
    router = _router(4)
    BiasController(router, rate=1e-3).step(torch.tensor([7, 1, 1, 1]))
    assert router.bias_E.tolist() == pytest.approx([-1.5e-3, 0.5e-3, 0.5e-3, 0.5e-3])


def test_a_thousand_small_steps_are_all_felt():
    router = _router(2)
    router.bias_E.copy_(torch.tensor([1.0, -1.0]))
    controller = BiasController(router.bfloat16(), rate=1e-3)
    for _ in range(1000):
        controller.step(torch.tensor([2, 6]))
    assert router.bias_E.tolist() == pytest.approx([2.0, -2.0], rel=1e-4)


def test_loads_that_differ_by_one_row_in_2_to_the_40_are_told_apart():
    router = _router(2)
    BiasController(router, rate=0.5).step(torch.tensor([2**40, 2**40 + 1]))
    assert router.bias_E.tolist() == [0.5, -0.5]


def test_a_step_follows_the_router_s_buffer_wherever_it_was_moved():
    router = _router(2)
    controller = BiasController(router, rate=0.5)
    router.load_state_dict({"weight": router.weight.detach().clone(), "bias_E": torch.tensor([3.0, -3.0])})
    router.half()
    controller.step(torch.tensor([6, 2]))
    assert router.bias_E.tolist() == [2.5, -2.5]


def test_a_router_without_a_bias_is_refused():
    with pytest.raises(ConfigError) as error:
        BiasController(TopKRouter(4, 3, top_k=2))
    assert str(error.value) == (
        "BiasController needs a router with a selection bias, got TopKRouter without one. "
        "Build a TopKRouter with selection_bias=True, or call its add_selection_bias()."
    )


def test_a_negative_rate_is_refused():
    with pytest.raises(ConfigError) as error:
        BiasController(_router(3), rate=-0.25)
    assert str(error.value) == "rate must be at least 0, got -0.25. DeepSeek-V3 uses 0.001."


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError) as error:
        BiasController(_router(3), rule="linear")
    assert str(error.value) == "rule must be 'sign' or 'proportional', got 'linear'. DeepSeek-V3 uses 'sign'."


@pytest.mark.parametrize("shape", [(4,), (1, 3), ()])
def test_loads_of_another_number_of_experts_are_refused(shape):
    with pytest.raises(ShapeError) as error:
        BiasController(_router(3)).step(torch.ones(shape))
    assert str(error.value) == (
        f"load_E must have one entry for each of 3 experts, got shape {shape}. "
        "Pass Routing.load_E, summed over the step."
    )


def test_at_a_rate_of_0_the_router_is_plain_top_k():
    """Reference 21.1, invariant c."""
    biased, plain = _router(4), TopKRouter(4, 4, top_k=2)
    plain.load_state_dict({"weight": biased.weight.detach()})
    BiasController(biased, rate=0.0).step(torch.tensor([9, 1, 0, 2]))
    assert biased.bias_E.tolist() == [0.0] * 4
    x_TD = torch.randn(30, 4)
    assert torch.equal(biased(x_TD).expert_N, plain(x_TD).expert_N)
