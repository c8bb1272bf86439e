"""Each kernel against the plain loops: outputs and every gradient, all sizes, with poisoned scratch memory."""

import itertools

import pytest
import torch
from torch import Tensor

from moesaic import Plan, Routing
from moesaic.kernels.activations import activation
from moesaic.kernels.grouped_ffn import KERNELS
from moesaic.kernels.grouped_ffn import torch as torch_kernel
from tests.oracle import experts as oracle
from tests.oracle.router import Row, Table
from tests.scratch import poisoned_scratch
from tests.tolerances import assert_close

E, D, F, K = 5, 8, 6, 2
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def _inputs(num_tokens: int, dtype: torch.dtype, *, gated: bool) -> dict[str, Tensor]:
    """Random, then rounded to ``dtype``: what is compared is the arithmetic, not the rounding of inputs."""
    wide = torch.promote_types(dtype, torch.float32)
    made = {
        "x_TD": torch.randn(num_tokens, D).to(dtype),
        "weight": (torch.rand(num_tokens * K) + 0.1).to(wide),
        "gate_EDF": (0.5 * torch.randn(E, D, F)).to(dtype),
        "up_EDF": (0.5 * torch.randn(E, D, F)).to(dtype),
        "down_EFD": (0.5 * torch.randn(E, F, D)).to(dtype),
    }
    return made if gated else {name: value for name, value in made.items() if name != "gate_EDF"}


def _choices(num_tokens: int) -> Tensor:
    """Distinct experts per token; expert 3 gets none."""
    order_TE = torch.rand(num_tokens, E).argsort(dim=-1)
    return order_TE[order_TE != 3].view(num_tokens, E - 1)[:, :K]


def _leaves(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: value.detach().to(dtype or value.dtype).clone().requires_grad_() for name, value in inputs.items()}


def _compare(kernel, dtype: torch.dtype, num_tokens: int, *, gated: bool, act: str) -> None:
    why_not = kernel.cannot(torch.device("cpu"), dtype)
    if why_not is not None:
        pytest.skip(f"kernel {kernel.name} cannot run on cpu in {dtype}: {why_not}")
    inputs = _inputs(num_tokens, dtype, gated=gated)
    expert_TK = _choices(num_tokens)
    kept_N = torch.rand(num_tokens * K) > 0.2

    leaves = _leaves(inputs)
    scores_TE = torch.zeros(num_tokens, E)
    routing = Routing.from_choices(expert_TK, leaves["weight"].view(num_tokens, K), scores_TE, scores_TE)
    plan = Plan.from_kept(routing, kept_N)
    stacks = [leaves.get(name) for name in ("gate_EDF", "up_EDF", "down_EFD")]
    probe_TD = torch.randn(num_tokens, D).to(dtype)
    with poisoned_scratch():
        y_TD = kernel.run(leaves["x_TD"], plan, *stacks, activation(act))
        y_TD.backward(probe_TD)

    truth = _leaves(inputs, torch.float64)
    table = Table(
        rows=[
            Row(token=t, choice=k, expert=int(expert_TK[t, k]), weight=truth["weight"][t * K + k])
            for t, k in itertools.product(range(num_tokens), range(K))
        ]
    )
    stacks = [truth.get(name) for name in ("gate_EDF", "up_EDF", "down_EFD")]
    expected_TD = oracle.combine(truth["x_TD"], table, kept_N.tolist(), *stacks, act)
    expected_TD.backward(probe_TD.double())

    assert y_TD.dtype == dtype
    assert_close(y_TD, expected_TD, "y_TD")
    for name, leaf in leaves.items():
        expected = truth[name].grad
        assert leaf.grad is not None, f"{name} has no gradient"
        expected = torch.zeros_like(leaf, dtype=torch.float64) if expected is None else expected
        assert_close(leaf.grad, expected, f"gradient of {name}", dtype)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@every_dtype
@every_kernel
def test_every_kernel_agrees_with_plain_loops_in_outputs_and_all_gradients(kernel, dtype, gated, num_tokens):
    _compare(kernel, dtype, num_tokens, gated=gated, act="silu")


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu", "relu_squared"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@every_kernel
def test_every_kernel_knows_every_activation(kernel, gated, act):
    _compare(kernel, torch.float64, 13, gated=gated, act=act)


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
    leaves = _leaves(_inputs(4, torch.float32, gated=True))
    scores_TE = torch.zeros(4, E)
    routing = Routing.from_choices(_choices(4), leaves["weight"].view(4, K), scores_TE, scores_TE)
    plan = Plan.from_kept(routing, routing.kept_N)
    with poisoned_scratch() as filled:
        torch_kernel.grouped_ffn_torch(
            leaves["x_TD"], plan, leaves["gate_EDF"], leaves["up_EDF"], leaves["down_EFD"], activation("silu")
        )
    assert filled.count(4 * K * F) == 2


@every_kernel
def test_a_kernel_computes_only_the_gradients_that_are_asked_for(kernel):
    inputs = _inputs(9, torch.float64, gated=True)
    for wanted in inputs:
        leaves = {name: value.double().requires_grad_(name == wanted) for name, value in inputs.items()}
        scores_TE = torch.zeros(9, E)
        routing = Routing.from_choices(_choices(9), leaves["weight"].view(9, K), scores_TE, scores_TE)
        plan = Plan.from_kept(routing, routing.kept_N)
        y_TD = kernel.run(
            leaves["x_TD"], plan, leaves["gate_EDF"], leaves["up_EDF"], leaves["down_EFD"], activation("silu")
        )
        y_TD.square().sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {wanted}
        assert leaves[wanted].grad.abs().sum() > 0
        leaves[wanted].grad = None


@every_kernel
def test_a_kernel_passes_gradcheck(kernel):
    leaves = _leaves(_inputs(4, torch.float64, gated=True))
    scores_TE = torch.zeros(4, E)
    expert_TK = _choices(4)

    def run(x_TD, weight, gate_EDF, up_EDF, down_EFD):
        routing = Routing.from_choices(expert_TK, weight.view(4, K), scores_TE, scores_TE)
        return kernel.run(x_TD, Plan.from_kept(routing, routing.kept_N), gate_EDF, up_EDF, down_EFD, activation("silu"))

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


@every_kernel
def test_a_kernel_leaves_its_inputs_as_they_were(kernel):
    inputs = _inputs(9, torch.float32, gated=True)
    leaves = _leaves(inputs)
    scores_TE = torch.zeros(9, E)
    routing = Routing.from_choices(_choices(9), leaves["weight"].view(9, K), scores_TE, scores_TE)
    grad_TD = torch.ones(1).expand(9, D)  # a gradient that must not be written to
    y_TD = kernel.run(
        leaves["x_TD"],
        Plan.from_kept(routing, routing.kept_N),
        leaves["gate_EDF"],
        leaves["up_EDF"],
        leaves["down_EFD"],
        activation("silu"),
    )
    y_TD.backward(grad_TD)
    for name, value in inputs.items():
        assert torch.equal(leaves[name], value), name
    assert torch.equal(grad_TD, torch.ones(9, D))
