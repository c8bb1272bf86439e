import pytest
import torch

from moesaic import ConfigError, MoELayer, ShapeError
from moesaic.experts import BiasedExperts
from moesaic.routers import TopKRouter
from tests.experts.test_stacked import plan_for
from tests.tolerances import assert_close


def experts_with(num_experts: int = 4, **options) -> BiasedExperts:
    experts = BiasedExperts(num_experts, 5, 3, **options).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts


def test_one_number_through_one_expert_by_hand():
    """gate 2, up 3, limit 7: 2 * sigmoid(1.702 * 2) * 4, then times down 0.5, plus 0.25, times the weight."""
    experts = BiasedExperts(1, 1, 1).double()
    values = {"gate_EDF": 1.5, "gate_bias_EF": 0.5, "up_EDF": 2.0, "up_bias_EF": 1.0}
    for name, value in (values | {"down_EFD": 0.5, "down_bias_ED": 0.25}).items():
        torch.nn.init.constant_(getattr(experts, name), value)
    plan, table = plan_for(1, 1, top_k=1)
    hidden = 2 / (1 + torch.tensor(-3.404).double().exp()) * 4
    expected = float(table.rows[0].weight * (hidden * 0.5 + 0.25))
    assert float(experts(torch.ones(1, 1, dtype=torch.float64), plan).detach()) == pytest.approx(expected)


@pytest.mark.parametrize(("gate", "up", "expected"), [(100.0, 0.0, 7.0), (-100.0, 0.0, 0.0), (7.0, 100.0, 56.0)])
def test_the_gate_is_cut_off_above_and_the_other_branch_on_both_sides(gate, up, expected):
    experts = BiasedExperts(1, 1, 1).double()
    torch.nn.init.zeros_(experts.gate_EDF)
    torch.nn.init.zeros_(experts.up_EDF)
    torch.nn.init.ones_(experts.down_EFD)
    torch.nn.init.constant_(experts.gate_bias_EF, gate)
    torch.nn.init.constant_(experts.up_bias_EF, up)
    plan, table = plan_for(1, 1, top_k=1)
    y = float(experts(torch.ones(1, 1, dtype=torch.float64), plan).detach()) / float(table.rows[0].weight)
    assert y == pytest.approx(expected, abs=1e-3)


def test_a_branch_that_is_cut_off_has_no_gradient():
    experts = experts_with(limit=1e-3)
    plan, _ = plan_for(11, 4)
    experts(torch.randn(11, 5, dtype=torch.float64), plan).sum().backward()
    assert (experts.up_EDF.grad == 0).double().mean() > 0.9
    assert experts.down_EFD.grad.abs().max() > 0


def test_an_idle_expert_and_an_empty_batch_have_gradients_of_zero():
    experts = experts_with(6)
    plan, table = plan_for(2, 6, top_k=1)
    experts(torch.randn(2, 5, dtype=torch.float64), plan).sum().backward()
    idle = next(e for e in range(6) if e not in [row.expert for row in table.rows])
    for parameter in experts.parameters():
        assert parameter.grad[idle].abs().sum() == 0
        assert parameter.grad.abs().sum() > 0
    experts.zero_grad()
    experts(torch.zeros(0, 5, dtype=torch.float64), plan_for(0, 6)[0]).sum().backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in experts.parameters())


def test_low_precision_is_close_and_keeps_the_tokens_dtype():
    experts = experts_with()
    plan, _ = plan_for(30, 4)
    x_TD = torch.randn(30, 5, dtype=torch.float64)
    exact_TD = experts(x_TD, plan)
    low = experts.bfloat16()
    low_TD = low(x_TD.bfloat16(), plan)
    assert low_TD.dtype == torch.bfloat16
    assert_close(low_TD, exact_TD, "outputs")
    with torch.autocast("cpu", torch.bfloat16):
        cast_TD = low.float()(x_TD.float(), plan)
    assert cast_TD.dtype == torch.float32
    assert_close(cast_TD, exact_TD, "outputs", torch.bfloat16)


def test_the_report_says_that_no_kernel_runs():
    layer = MoELayer(TopKRouter(5, 4, top_k=2), BiasedExperts(4, 5, 3))
    assert layer.kernel_report() == "BiasedExperts: PyTorch, a loop over experts by autograd; no kernel has biases"


def test_fresh_biases_are_zero_and_weights_drawn():
    experts = BiasedExperts(4, 50, 60)
    for name, parameter in experts.named_parameters():
        expected = 0.0 if "bias" in name else 0.02
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(("alpha", "limit"), [(0.0, 7.0), (1.702, -1.0)])
def test_numbers_that_are_not_positive_are_refused(alpha, limit):
    with pytest.raises(ConfigError) as error:
        BiasedExperts(4, 5, 3, alpha=alpha, limit=limit)
    assert str(error.value) == f"alpha and limit must be positive, got {alpha} and {limit}. gpt-oss uses 1.702 and 7."


def test_a_plan_for_another_number_of_experts_is_refused():
    with pytest.raises(ShapeError) as error:
        BiasedExperts(4, 5, 3)(torch.zeros(7, 5), plan_for(7, 6)[0])
    assert str(error.value) == (
        "the plan must be for 4 experts, got one for 6. Build router and experts with the same num_experts."
    )
