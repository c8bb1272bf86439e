"""Experts whose input, not output, is multiplied by the row's weight (Llama 4)."""

import pytest
import torch

from moesaic import ConfigError, Plan
from moesaic.experts import GatedExperts
from tests.experts.test_stacked import plan_for
from tests.kernels.case import IN_FLOAT64
from tests.oracle import experts as oracle
from tests.tolerances import assert_close


def _experts(kernel="auto", weigh="input") -> GatedExperts:
    experts = GatedExperts(4, 5, 3, kernel=kernel, weigh=weigh).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


@pytest.mark.parametrize("kernel", ["auto", *IN_FLOAT64], ids=lambda kernel: getattr(kernel, "name", kernel))
@pytest.mark.parametrize("num_tokens", [0, 1, 11])
def test_weighed_inputs_agree_with_plain_loops_in_outputs_and_every_gradient(num_tokens, kernel):
    experts = _experts(kernel)
    plan, table = plan_for(num_tokens, 4)
    weight_N = torch.tensor([float(row.weight) for row in table.rows], dtype=torch.float64).requires_grad_()
    plan = Plan(**{name: getattr(plan, name) for name in plan.__slots__} | {"weight_N": weight_N[plan.row_N]})
    x_TD = torch.randn(num_tokens, 5, dtype=torch.float64, requires_grad=True)
    stacks = [p.detach().clone().requires_grad_() for p in (experts.gate_EDF, experts.up_EDF, experts.down_EFD)]
    truth_N, truth_TD = weight_N.detach().clone().requires_grad_(), x_TD.detach().clone().requires_grad_()
    outputs = [0 * x for x in truth_TD]
    for row, weight in zip(table.rows, truth_N, strict=True):
        y = oracle.feed_forward(weight * truth_TD[row.token], *(stack[row.expert] for stack in stacks), "silu")
        outputs[row.token] = outputs[row.token] + y
    expected_TD = torch.stack(outputs) if outputs else truth_TD * 1
    y_TD = experts(x_TD, plan)
    assert_close(y_TD, expected_TD, "outputs")
    probe_TD = torch.randn_like(y_TD)
    (y_TD * probe_TD).sum().backward()
    (expected_TD * probe_TD).sum().backward()
    assert_close(x_TD.grad, truth_TD.grad, "gradient of x_TD")
    assert_close(weight_N.grad, truth_N.grad if num_tokens else weight_N.grad, "gradient of weight_N")
    for parameter, stack in zip((experts.gate_EDF, experts.up_EDF, experts.down_EFD), stacks, strict=True):
        expected = torch.zeros_like(stack) if stack.grad is None else stack.grad
        assert_close(parameter.grad, expected, "gradient of a weight")


def test_weighing_the_input_is_not_weighing_the_output():
    plan, _ = plan_for(11, 4)
    x_TD = torch.randn(11, 5, dtype=torch.float64)
    experts = _experts()
    other = _experts(weigh="output")
    other.load_state_dict(experts.state_dict())
    assert (experts(x_TD, plan) - other(x_TD, plan)).abs().max() > 0.05


def test_rows_that_are_left_out_are_not_even_read():
    experts = _experts()
    plan, _ = plan_for(6, 4, top_k=1)
    x_TD = torch.randn(6, 5, dtype=torch.float64)
    last = int(plan.token_N[-1])
    e = int((plan.offset_E < 6).sum())
    load_E = plan.load_E.clone()
    load_E[e] -= 1
    kept_N = torch.ones(6, dtype=torch.bool)
    kept_N[last] = False
    fewer = Plan(
        row_N=plan.row_N,
        token_N=plan.token_N,
        weight_N=plan.weight_N,
        load_E=load_E,
        offset_E=load_E.cumsum(0),
        kept_N=kept_N,
    )
    x_TD[last] = float("nan")
    x_TD.requires_grad_()
    y_TD = experts(x_TD, fewer)
    assert y_TD.isfinite().all()
    assert y_TD[last].abs().sum() == 0
    y_TD.sum().backward()
    assert x_TD.grad.isfinite().all()


def test_low_precision_multiplies_in_the_router_s_precision():
    experts = _experts().bfloat16()
    plan, _ = plan_for(30, 4)
    x_TD = torch.randn(30, 5).bfloat16()
    low_TD = experts(x_TD, plan)
    assert low_TD.dtype == torch.bfloat16
    assert_close(low_TD, experts.double()(x_TD.double(), plan), "outputs")


def test_anything_else_is_refused():
    with pytest.raises(ConfigError) as error:
        GatedExperts(4, 5, 3, weigh="both")
    assert str(error.value) == "weigh must be 'output' or 'input', got 'both'. Only Llama 4 weighs the input."
