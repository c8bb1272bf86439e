"""Each kernel against the plain loops: outputs and every gradient, all sizes, with poisoned scratch memory.

Triton's interpreter is slow, so its kernel has a file of its own.
"""

import pytest
import torch

from moesaic.kernels.grouped_ffn import KERNELS
from moesaic.kernels.grouped_ffn import torch as torch_kernel
from tests.kernels.case import CPU, Case, D, F, K, choices, choices_of_loads, compare, leaves_of
from tests.scratch import poisoned_scratch

every_kernel = pytest.mark.parametrize(
    "kernel", [kernel for kernel in KERNELS if kernel.name != "triton"], ids=lambda kernel: kernel.name
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _compiled_for_native(request):
    """Have the kernels in C, where they are the ones tested and a compiler is there."""
    kernel = request.node.callspec.params.get("kernel") if hasattr(request.node, "callspec") else None
    if kernel is not None and kernel.name == "native":
        request.getfixturevalue("compiled")


def _exact(kernel) -> torch.dtype:
    """The widest dtype that a kernel multiplies."""
    return torch.float64 if kernel.cannot(CPU, torch.float64) is None else torch.float32


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@every_dtype
@every_kernel
def test_every_kernel_agrees_with_plain_loops_in_outputs_and_all_gradients(kernel, dtype, gated, num_tokens):
    compare(kernel, Case.of(choices(num_tokens), dtype, gated=gated))


@pytest.mark.parametrize("loads", [(0, 1, 7, 63, 16), (63, 0, 0, 0, 0), (17, 15, 1, 0, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kernel
def test_every_kernel_agrees_with_plain_loops_however_uneven_the_loads_are(kernel, dtype, loads):
    compare(kernel, Case.of(choices_of_loads(*loads), dtype))


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu", "relu_squared"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@every_kernel
def test_every_kernel_knows_every_activation(kernel, gated, act):
    compare(kernel, Case.of(choices(13), _exact(kernel), gated=gated, act=act))


def test_poisoned_scratch_finds_a_kernel_that_forgets_to_write():
    with poisoned_scratch() as filled:
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.ones(2).new_empty(4).isnan().all()
        assert int(torch.empty(1, dtype=torch.int64)) > 2**61
    assert filled == [3, 2, 4, 1]
    assert torch.empty is not None
    assert "mock" not in repr(torch.empty)


def test_the_poison_reaches_the_scratch_of_the_torch_kernel():
    case = Case.of(choices(4), torch.float32)
    with poisoned_scratch() as filled:
        case.run(torch_kernel.grouped_ffn_torch, leaves_of(case.inputs))
    assert filled.count(int(case.kept_N.sum()) * F) >= 2


@every_kernel
def test_a_kernel_computes_only_the_gradients_that_are_asked_for(kernel):
    case = Case.of(choices(9), _exact(kernel))
    for wanted in case.inputs:
        leaves = {name: value.clone().requires_grad_(name == wanted) for name, value in case.inputs.items()}
        case.run(kernel.run, leaves).square().sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {wanted}
        assert leaves[wanted].grad.abs().sum() > 0


@every_kernel
def test_a_kernel_passes_gradcheck(kernel):
    if _exact(kernel) != torch.float64:
        pytest.skip(f"kernel {kernel.name}: {kernel.cannot(CPU, torch.float64)}, and gradcheck needs float64")
    case = Case.of(choices(4), torch.float64)
    leaves = leaves_of(case.inputs)

    def run(*values):
        return case.run(kernel.run, dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


@every_kernel
def test_a_kernel_leaves_its_inputs_as_they_were(kernel):
    case = Case.of(choices(9), torch.float32)
    leaves = leaves_of(case.inputs)
    grad_TD = torch.ones(1).expand(9, D)  # a gradient that must not be written to
    case.run(kernel.run, leaves).backward(grad_TD)
    for name, value in case.inputs.items():
        assert torch.equal(leaves[name], value), name
    assert torch.equal(grad_TD, torch.ones(9, D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kernel
def test_a_kernel_gives_the_same_bits_twice(kernel, dtype):
    case = Case.of(choices(63), dtype)
    runs = []
    for _ in range(2):
        leaves = leaves_of(case.inputs)
        y_TD = case.run(kernel.run, leaves)
        y_TD.square().sum().backward()
        runs.append([y_TD, *(leaf.grad for leaf in leaves.values())])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@every_kernel
def test_what_padding_holds_reaches_nothing(kernel):
    """Rows that no expert takes are of tokens that may hold anything: NaN times 0 would be NaN."""
    case = Case.of(choices(9), torch.float32)
    case.kept_N[4 * K : 5 * K] = False
    case.inputs["x_TD"][4] = float("nan")
    leaves = leaves_of(case.inputs)
    y_TD = case.run(kernel.run, leaves)
    y_TD.square().sum().backward()
    assert y_TD.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())
    assert not y_TD[4].any()


@pytest.fixture
def _filled_by_torch():
    """What PyTorch's own operations leave unwritten is NaN, or the largest number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_filled_by_torch")
def test_rows_that_grouped_mm_leaves_unwritten_reach_nothing():
    """Behind the last expert's rows its result is scratch memory."""
    weights = torch.ones(2, 8, 8)
    left_ND = torch.nn.functional.grouped_mm(torch.ones(6, 8), weights, offs=torch.tensor([2, 4], dtype=torch.int32))
    assert left_ND[4:].isnan().all()
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == "grouped_mm")
    for dtype in (torch.float32, torch.bfloat16):
        compare(kernel, Case.of(choices(63), dtype))
