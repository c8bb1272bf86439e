"""One case for all kernels: inputs, a routing and a plan, and the plain loops that outputs and gradients must equal."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moesaic import Plan, Routing
from moesaic.kernels.activations import activation
from moesaic.kernels.grouped_ffn import KERNELS, Kernel
from tests.oracle import experts as oracle
from tests.oracle.router import Row, Table
from tests.scratch import poisoned_scratch
from tests.tolerances import assert_close

# Rows of 8 numbers are 16 bytes in bfloat16, which grouped_mm asks for; 24 is no whole number of Triton's blocks.
E, D, F, K = 5, 8, 24, 2
CPU = torch.device("cpu")
# Those that take any shape, and are not for GPUs alone.
IN_FLOAT64 = [kernel for kernel in KERNELS if kernel.cannot(CPU, torch.float64) is None]


@dataclass(frozen=True)
class Case:
    """What a kernel is given.

    Attributes:
        inputs: x_TD, weight (N,), gate_EDF unless plain, up_EDF, down_EFD.
        expert_TK: who goes where.
        kept_N: False on rows that no expert takes.
        act: name of the activation.
    """

    inputs: dict[str, Tensor]
    expert_TK: Tensor
    kept_N: Tensor
    act: str = "silu"

    @classmethod
    def of(cls, expert_TK: Tensor, dtype: torch.dtype, *, gated: bool = True, act: str = "silu") -> "Case":
        """Random inputs for a routing, a fifth of its rows dropped."""
        num_tokens, top_k = expert_TK.shape
        kept_N = torch.rand(num_tokens * top_k) > 0.2
        return cls(inputs(num_tokens, dtype, top_k=top_k, gated=gated), expert_TK, kept_N, act)

    def plan(self, weight: Tensor) -> Plan:
        """The rows that are kept, sorted."""
        num_tokens, top_k = self.expert_TK.shape
        scores_TE = torch.zeros(num_tokens, E, device=weight.device)
        expert_TK, kept_N = self.expert_TK.to(weight.device), self.kept_N.to(weight.device)
        routing = Routing.from_choices(expert_TK, weight.view(num_tokens, top_k), scores_TE, scores_TE)
        return Plan.from_kept(routing, kept_N)

    def run(self, run: Callable[..., Tensor], leaves: dict[str, Tensor]) -> Tensor:
        """The outputs of a kernel."""
        stacks = [leaves.get(name) for name in ("gate_EDF", "up_EDF", "down_EFD")]
        return run(leaves["x_TD"], self.plan(leaves["weight"]), *stacks, activation(self.act))

    def expected(self, leaves: dict[str, Tensor]) -> Tensor:
        """The outputs of the plain loops."""
        table = Table(
            rows=[
                Row(token=t, choice=k, expert=int(self.expert_TK[t, k]), weight=leaves["weight"][t * len(row) + k])
                for t, row in enumerate(self.expert_TK)
                for k in range(len(row))
            ]
        )
        stacks = [leaves.get(name) for name in ("gate_EDF", "up_EDF", "down_EFD")]
        return oracle.combine(leaves["x_TD"], table, self.kept_N.tolist(), *stacks, self.act)


def inputs(num_tokens: int, dtype: torch.dtype, *, top_k: int = K, gated: bool = True) -> dict[str, Tensor]:
    """Random, then rounded to ``dtype``: what is compared is the arithmetic, not the rounding of inputs."""
    wide = torch.promote_types(dtype, torch.float32)
    made = {
        "x_TD": torch.randn(num_tokens, D).to(dtype),
        "weight": (torch.rand(num_tokens * top_k) + 0.1).to(wide),
        "gate_EDF": (0.5 * torch.randn(E, D, F)).to(dtype),
        "up_EDF": (0.5 * torch.randn(E, D, F)).to(dtype),
        "down_EFD": (0.5 * torch.randn(E, F, D)).to(dtype),
    }
    return made if gated else {name: value for name, value in made.items() if name != "gate_EDF"}


def choices(num_tokens: int) -> Tensor:
    """Distinct experts per token; expert 3 gets none."""
    order_TE = torch.rand(num_tokens, E).argsort(dim=-1)
    return order_TE[order_TE != 3].view(num_tokens, E - 1)[:, :K]


def choices_of_loads(*loads: int) -> Tensor:
    """One choice for each token, so that expert ``e`` gets ``loads[e]`` of them, in a random order."""
    expert_T = torch.tensor(list(itertools.chain.from_iterable([e] * load for e, load in enumerate(loads))))
    return expert_T[torch.randperm(len(expert_T))][:, None]


def leaves_of(
    inputs: dict[str, Tensor], dtype: torch.dtype | None = None, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Copies that gradients can be taken of."""
    return {
        name: value.detach().to(device, dtype or value.dtype).clone().requires_grad_() for name, value in inputs.items()
    }


def skip_unless_runs(kernel: Kernel, case: Case, device: torch.device = CPU) -> None:
    """Say loudly which kernel is not tried, and why."""
    stacks = tuple(case.inputs.get(name) for name in ("gate_EDF", "up_EDF", "down_EFD"))
    dtype = case.inputs["x_TD"].dtype
    why_not = kernel.why_not(device, dtype, stacks)
    if why_not is not None:
        pytest.skip(f"kernel {kernel.name} cannot run on {device.type} in {dtype}: {why_not}")


def compare(kernel: Kernel, case: Case, device: torch.device = CPU) -> None:
    """Outputs and every gradient against the plain loops in float64, with poisoned scratch memory."""
    skip_unless_runs(kernel, case, device)
    dtype = case.inputs["x_TD"].dtype
    leaves, truth = leaves_of(case.inputs, device=device), leaves_of(case.inputs, torch.float64)
    probe_TD = torch.randn(case.inputs["x_TD"].shape).to(dtype)
    with poisoned_scratch():
        y_TD = case.run(kernel.run, leaves)
        y_TD.backward(probe_TD.to(device))
    expected_TD = case.expected(truth)
    expected_TD.backward(probe_TD.double())

    assert y_TD.dtype == dtype
    assert_close(y_TD.cpu(), expected_TD, "y_TD")
    for name, leaf in leaves.items():
        expected = truth[name].grad
        assert leaf.grad is not None, f"{name} has no gradient"
        expected = torch.zeros(leaf.shape, dtype=torch.float64) if expected is None else expected
        assert_close(leaf.grad.cpu(), expected, f"gradient of {name}", dtype)
