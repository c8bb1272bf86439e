"""Laws of precision, for every recipe: the router runs in float32 at least, autocast or not."""

import pytest
import torch

from tests.laws.settings import every_setting, gradients, tokens
from tests.tolerances import assert_close


@every_setting()
def test_the_router_of_a_bfloat16_model_runs_in_float32(setting):
    """Reference 5.6, example 5."""
    layer = setting.deterministic_layer().bfloat16()
    x_TD = tokens(200, dtype=torch.bfloat16)
    y_TD, routing = layer(x_TD)
    assert y_TD.dtype == torch.bfloat16
    assert {routing.logits_TE.dtype, routing.scores_TE.dtype, routing.weight_N.dtype} == {torch.float32}
    wide = setting.deterministic_layer().bfloat16().float()
    wide.load_state_dict(layer.state_dict())
    same = wide.router(x_TD.float())
    assert torch.equal(routing.expert_N, same.expert_N)
    assert torch.equal(routing.logits_TE, same.logits_TE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_setting()
def test_the_router_runs_in_float32_under_autocast(setting, dtype):
    """Reference, section 24."""
    layer = setting.deterministic_layer()
    x_TD = tokens(200).to(dtype)
    expected = layer.router(x_TD.float())
    with torch.autocast("cpu", torch.bfloat16):
        y_TD, routing = layer(x_TD)
    assert y_TD.dtype == dtype
    assert {routing.logits_TE.dtype, routing.scores_TE.dtype, routing.weight_N.dtype} == {torch.float32}
    assert torch.equal(routing.logits_TE, expected.logits_TE)
    assert torch.equal(routing.expert_N, expected.expert_N)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@every_setting()
def test_gradients_under_autocast_are_float32_and_right(setting, kernel):
    layer = setting.deterministic_layer(kernel=kernel)
    x_TD = tokens(40).requires_grad_()
    probe_TD = torch.randn(40, x_TD.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        y_TD, routing = layer(x_TD)
        loss = (y_TD * probe_TD).sum() + setting.aux_loss(routing)
    loss.backward()
    cast, cast_x_TD = gradients(layer), x_TD.grad.clone()
    layer.double().zero_grad()
    exact_TD = x_TD.detach().double().requires_grad_()
    y_TD, routing = layer(exact_TD)
    ((y_TD * probe_TD).sum() + setting.aux_loss(routing)).backward()
    assert cast_x_TD.dtype == torch.float32
    assert_close(cast_x_TD, exact_TD.grad, "gradient of x_TD", torch.bfloat16)
    for name, exact in gradients(layer).items():
        assert cast[name].dtype == torch.float32
        assert_close(cast[name], exact, f"gradient of {name}", torch.bfloat16)


@every_setting()
def test_experts_work_in_autocast_s_dtype(setting):
    """That the test above compares something: outputs are rounded."""
    layer = setting.deterministic_layer()
    x_TD = tokens(40)
    exact_TD, _ = layer(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        cast_TD, _ = layer(x_TD)
    assert not torch.equal(exact_TD, cast_TD)
    assert_close(cast_TD, exact_TD, "outputs", torch.bfloat16)


@every_setting()
def test_a_cast_of_the_model_keeps_the_selection_bias_exact(setting):
    """Trap 13: steps of 0.001 vanish in bfloat16."""
    layer = setting.layer()
    if layer.router.bias_E is None:
        assert not any(name.endswith("bias_E") for name in layer.state_dict())
        return
    exact_E = layer.router.bias_E.clone() + 1e-4
    layer.router.bias_E.copy_(exact_E)
    assert torch.equal(layer.bfloat16().router.bias_E, exact_E)


@every_setting()
def test_every_dtype_gives_finite_outputs_close_to_float64(setting):
    layer = setting.deterministic_layer().eval().bfloat16()
    x_TD = tokens(40, dtype=torch.bfloat16)
    low_TD, low = layer(x_TD)
    mid_TD, mid = layer.float()(x_TD.float())
    exact_TD, exact = layer.double()(x_TD.double())
    assert torch.equal(low.expert_N, mid.expert_N)
    assert torch.equal(mid.expert_N, exact.expert_N)
    assert_close(low_TD, exact_TD, "bfloat16")
    assert_close(mid_TD, exact_TD, "float32")
