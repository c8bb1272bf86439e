"""What only the kernel in plain PyTorch does: experts side by side, and rows one by one in generation."""

import pytest
import torch

from moesaic.kernels.grouped_ffn import KERNELS
from moesaic.kernels.grouped_ffn import torch as torch_kernel
from moesaic.kernels.grouped_ffn.few_rows import are_few, grouped_ffn_few_rows
from tests.kernels.case import Case, E, choices, choices_of_loads, compare, leaves_of
from tests.tolerances import assert_close

KERNEL = next(kernel for kernel in KERNELS if kernel.name == "torch")
LOADS = [(0, 1, 7, 63, 16), (63, 0, 0, 0, 0), (17, 15, 1, 0, 33), (40, 40, 40, 40, 40)]


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count}-threads")
def shared_out(request, monkeypatch):
    """Even the smallest layer is shared out over so many threads."""
    monkeypatch.setattr(torch_kernel, "SMALL_LAYER", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("loads", LOADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("shared_out")
def test_experts_side_by_side_agree_with_plain_loops(dtype, loads, gated):
    compare(KERNEL, Case.of(choices_of_loads(*loads), dtype, gated=gated))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("shared_out")
def test_experts_side_by_side_give_the_same_bits_every_time(dtype):
    case = Case.of(choices_of_loads(*LOADS[2]), dtype)

    def bits():
        leaves = leaves_of(case.inputs)
        y_TD = case.run(KERNEL.run, leaves)
        y_TD.float().square().sum().backward()
        return [y_TD.detach(), *(leaf.grad for leaf in leaves.values())]

    first = bits()
    for _ in range(5):
        assert all(torch.equal(one, again) for one, again in zip(first, bits(), strict=True))


@pytest.mark.usefixtures("shared_out")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_experts_side_by_side_run_without_a_graph_as_with_one(mode):
    case = Case.of(choices_of_loads(*LOADS[3]), torch.float32)
    leaves = leaves_of(case.inputs)
    with_graph_TD = case.run(KERNEL.run, leaves).detach()
    with mode():
        made_in_mode = {name: value.clone() for name, value in leaves.items()}
        assert torch.equal(case.run(KERNEL.run, made_in_mode), with_graph_TD)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_one_by_one_agree_with_plain_loops(dtype, num_tokens, gated):
    case = Case.of(choices(num_tokens), dtype, gated=gated)
    with torch.no_grad():
        y_TD = case.run(grouped_ffn_few_rows, leaves_of(case.inputs))
    assert y_TD.dtype == dtype
    assert_close(y_TD, case.expected(leaves_of(case.inputs, torch.float64)), "y_TD")


@pytest.fixture
def one_by_one(monkeypatch):
    """How many rows each call ran one by one."""
    seen: list[int] = []

    def spy(x_TD, plan, *rest):
        seen.append(int(plan.load_E.sum()))
        return grouped_ffn_few_rows(x_TD, plan, *rest)

    monkeypatch.setattr(torch_kernel, "grouped_ffn_few_rows", spy)
    return seen


def test_generation_runs_rows_one_by_one_and_training_does_not(one_by_one):
    case = Case.of(choices(3), torch.float32)
    leaves = leaves_of(case.inputs)
    with_graph_TD = case.run(KERNEL.run, leaves)
    assert one_by_one == []
    with torch.no_grad():
        y_TD = case.run(KERNEL.run, leaves)
    assert one_by_one == [int(case.kept_N.sum())]
    assert_close(y_TD, with_graph_TD.double(), "y_TD")
    with torch.inference_mode():
        assert torch.equal(case.run(KERNEL.run, leaves), y_TD)


def test_many_rows_and_weights_in_another_order_are_not_run_one_by_one(one_by_one):
    many = Case.of(choices_of_loads(30, 30, 30, 30, 30), torch.float32)
    few = Case.of(choices(3), torch.float32)
    turned = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2)
        for name, value in few.inputs.items()
        if value.ndim == 3
    }
    leaves = leaves_of(few.inputs)
    with torch.no_grad():
        many.run(KERNEL.run, leaves_of(many.inputs))
        y_TD = few.run(KERNEL.run, leaves | turned)
        assert one_by_one == []
        assert_close(y_TD, few.run(KERNEL.run, leaves).double(), "y_TD")
    assert len(one_by_one) == 1


def test_few_rows_means_few_for_each_expert_that_has_any():
    stack = torch.zeros(E, 2, 2)
    for loads, few in [
        ((4, 4, 0, 0, 0), True),
        ((9, 0, 0, 0, 0), False),
        ((4, 5, 4, 4, 4), False),
    ]:
        case = Case.of(choices_of_loads(*loads), torch.float32)
        case.kept_N.fill_(True)
        assert are_few(case.plan(case.inputs["weight"][: sum(loads)]), stack) is few, loads
