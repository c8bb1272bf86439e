"""Gradients lie as their weights do: what the optimizer reads is what the kernel wrote, without a copy."""

import pytest
import torch

from moesaic.kernels.grouped_ffn import torch as torch_kernel
from moesaic.kernels.grouped_ffn.layout import gradients_like, halves
from tests.kernels.case import Case, D, E, F, choices
from tests.tolerances import assert_close

ORDERS = {"(E, D, 2F)": (0, 1, 2), "(E, 2F, D)": (0, 2, 1)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_kept_as_one_get_the_gradients_of_weights_kept_apart(dtype, order, monkeypatch):
    case = Case.of(choices(63), dtype)
    apart = {name: value.clone().requires_grad_() for name, value in case.inputs.items()}
    case.run(torch_kernel.grouped_ffn_torch, apart).float().square().sum().backward()

    whole = torch.cat([case.inputs["gate_EDF"], case.inputs["up_EDF"]], dim=-1).permute(order).contiguous()
    whole.requires_grad_()
    down = case.inputs["down_EFD"].permute(order).contiguous().requires_grad_()
    gate_EDF, up_EDF = halves(whole.permute(order))
    made = []
    monkeypatch.setattr(torch_kernel, "gradients_like", lambda weights: made.extend(gradients_like(weights)) or made)
    leaves = case.inputs | {"gate_EDF": gate_EDF, "up_EDF": up_EDF, "down_EFD": down.permute(order)}
    case.run(torch_kernel.grouped_ffn_torch, leaves).float().square().sum().backward()

    expected = torch.cat([apart["gate_EDF"].grad, apart["up_EDF"].grad], dim=-1).permute(order)
    assert_close(whole.grad, expected.double(), "gradient of gate and up")
    assert_close(down.grad, apart["down_EFD"].grad.permute(order).double(), "gradient of down")
    # No copy: the optimizer gets the very memory that the kernel wrote.
    assert whole.grad.is_contiguous()
    assert whole.grad.data_ptr() == made[0].data_ptr()
    assert down.grad.data_ptr() == made[2].data_ptr()


def test_gradients_that_lie_elsewhere_are_put_together():
    both = torch.randn(E, D, 2 * F, requires_grad=True)
    gate_EDF, up_EDF = halves(both)
    (gate_EDF.square().sum() + (3 * up_EDF).sum()).backward()
    torch.testing.assert_close(both.grad, torch.cat([2 * both[..., :F].detach(), torch.full((E, D, F), 3.0)], dim=-1))


def test_only_weights_that_fill_one_memory_share_one_for_their_gradients():
    both = torch.randn(E, D, 2 * F)
    gate_EDF, up_EDF = both.chunk(2, dim=-1)
    shared = gradients_like([gate_EDF, up_EDF, None])
    assert shared[0].untyped_storage().data_ptr() == shared[1].untyped_storage().data_ptr()
    assert [one.stride() for one in shared[:2]] == [both.stride()] * 2
    assert shared[2] is None
    thirds = torch.randn(E, D, 3 * F).chunk(3, dim=-1)
    for one, other in [(thirds[0], thirds[1]), (thirds[0], thirds[2]), (gate_EDF, up_EDF.clone())]:
        made = gradients_like([one, other])
        assert made[0].untyped_storage().data_ptr() != made[1].untyped_storage().data_ptr()
        assert all(each.is_contiguous() for each in made)
