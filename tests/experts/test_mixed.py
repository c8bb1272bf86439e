from dataclasses import replace

import pytest
import torch

from moesaic import ConfigError, Plan, Routing, ShapeError
from moesaic.experts import CopyExpert, GatedExperts, MixedExperts, MLPExperts, SequentialExperts, ZeroExpert
from tests.kernels.case import IN_FLOAT64
from tests.tolerances import assert_close


def _wide(weight: torch.Tensor, _fan_in: int) -> None:
    torch.nn.init.normal_(weight, std=0.5)


def _plan(num_tokens: int, num_experts: int, top_k: int) -> Plan:
    expert_TK = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]).view(num_tokens, top_k)
    scores_TE = torch.rand(num_tokens, num_experts, dtype=torch.float64)
    weight_TK = scores_TE.gather(1, expert_TK)
    routing = Routing.from_choices(expert_TK, weight_TK, scores_TE, scores_TE)
    return Plan.from_kept(routing, torch.rand(routing.num_rows) > 0.2)


@pytest.mark.parametrize("kernel", [kernel.name for kernel in IN_FLOAT64])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_blocks_of_unequal_experts_do_what_one_list_of_them_does(num_tokens, kernel):
    wide, narrow = (GatedExperts(2, 5, hidden, kernel=kernel, init=_wide).double() for hidden in (7, 3))
    plain = MLPExperts(1, 5, 4, kernel=kernel, init=_wide).double()
    mixed = MixedExperts(wide, narrow, SequentialExperts([CopyExpert()]), plain)
    assert (mixed.num_experts, mixed.sizes, mixed.kernel) == (6, (2, 2, 1, 1), kernel)

    class One(torch.nn.Module):
        def __init__(self, block, e):
            super().__init__()
            self.block, self.e = block, e

        def forward(self, x_MD):
            gate = self.block.gate_EDF[self.e] if isinstance(self.block, GatedExperts) else None
            up_MF = x_MD @ self.block.up_EDF[self.e]
            act = self.block.activation.forward
            hidden_MF = act(up_MF) if gate is None else act(x_MD @ gate) * up_MF
            return hidden_MF @ self.block.down_EFD[self.e]

    listed = SequentialExperts(
        [One(wide, 0), One(wide, 1), One(narrow, 0), One(narrow, 1), CopyExpert(), One(plain, 0)]
    )
    plan = _plan(num_tokens, 6, 3)
    results = []
    for experts in (mixed, listed):
        experts.zero_grad()
        x_TD = torch.randn(num_tokens, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        x_TD.requires_grad_()
        weight_N = plan.weight_N.clone().requires_grad_()
        y_TD = experts(x_TD, replace(plan, weight_N=weight_N))
        y_TD.square().sum().backward()
        grads = [p.grad.clone() for block in (wide, narrow, plain) for p in block.parameters()]
        results.append([y_TD.detach(), x_TD.grad, weight_N.grad, *grads])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, "mixed")


def test_no_token_at_all_gives_zero_gradients_to_every_part():
    mixed = MixedExperts(GatedExperts(2, 5, 3), MLPExperts(2, 5, 4))
    scores_TE = torch.zeros(0, 4)
    none_TK = torch.zeros(0, 2, dtype=torch.int64)
    routing = Routing.from_choices(none_TK, torch.zeros(0, 2), scores_TE, scores_TE)
    mixed(torch.zeros(0, 5), Plan.from_kept(routing, routing.kept_N)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in mixed.parameters())


def test_parts_are_added_in_float32():
    """Each returns 1 + 2^-8 times a weight; their sum in bfloat16 would lose the last bit before it counts."""
    mixed = MixedExperts(*[SequentialExperts([CopyExpert()]) for _ in range(3)])
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16)
    scores_TE = torch.zeros(1, 3)
    weight_TK = torch.tensor([[1.0, 2.0**-8, 2.0**-8]])
    routing = Routing.from_choices(torch.arange(3)[None], weight_TK, scores_TE, scores_TE)
    assert mixed(x_TD, Plan.from_kept(routing, routing.kept_N)).item() == 1 + 2.0**-7


def test_no_part_and_a_plan_of_another_size_are_refused():
    with pytest.raises(ConfigError) as error:
        MixedExperts()
    assert str(error.value) == "MixedExperts needs at least one block of experts, got none. Pass GatedExperts(...)."
    with pytest.raises(ShapeError) as error:
        MixedExperts(SequentialExperts([CopyExpert(), ZeroExpert()]))(torch.zeros(3, 5), _plan(3, 3, 1))
    assert str(error.value) == (
        "the plan must be for 2 experts, got one for 3. Build router and experts with the same num_experts."
    )


def test_only_parts_that_take_a_kernel_are_reported():
    assert MixedExperts(SequentialExperts([CopyExpert()])).kernel is None
    assert (
        MixedExperts(SequentialExperts([CopyExpert()]), MLPExperts(1, 5, 3, kernel="reference")).kernel == "reference"
    )
