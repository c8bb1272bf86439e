import math

import pytest
import torch

from moesaic import Context, LoRAMoE, MoLE
from moesaic.experts import LoRAExperts, SharedExpert
from tests.laws.settings import some_padding, tokens
from tests.tolerances import assert_close

WIDTH, HIDDEN, NUM_EXPERTS = 6, 5, 3


def _wide(weight: torch.Tensor, _fan_in: int) -> None:
    torch.nn.init.normal_(weight, std=0.5)


def _experts(num_experts: int = NUM_EXPERTS, *, fresh: bool = False) -> LoRAExperts:
    experts = LoRAExperts(num_experts, WIDTH, HIDDEN, rank=2, alpha=3.0, init=_wide).double()
    for low_rank in (experts.gate, experts.up, experts.down):
        if not fresh:
            torch.nn.init.normal_(low_rank.out_ERF, std=0.5)
    return experts


def _lora_moe(**options) -> LoRAMoE:
    return LoRAMoE(WIDTH, HIDDEN, _experts(**options), init=_wide).double()


def _mole(num_experts: int = NUM_EXPERTS, **options) -> MoLE:
    return MoLE(WIDTH, _experts(num_experts, **options), init=_wide).double()


@pytest.mark.parametrize("build", [_lora_moe, _mole])
def test_a_fresh_layer_is_the_dense_network_it_was_loaded_with(build):
    """Reference 12.4: B = 0, so the output equals the base model's."""
    layer, dense = build(fresh=True), SharedExpert(WIDTH, HIDDEN, init=_wide).double()
    layer.experts.load_base(dense.gate_DF, dense.up_DF, dense.down_FD)
    x_TD = tokens(9, WIDTH, torch.float64)
    assert_close(layer(x_TD)[0], dense(x_TD), "outputs")


@pytest.mark.parametrize("build", [_lora_moe, _mole])
def test_weights_add_up_to_one_and_scores_are_the_softmax_of_logits(build):
    layer, valid_T = build(), some_padding(20)
    _, routing = layer(tokens(20, WIDTH, torch.float64), valid_T)
    assert routing.num_rows == 20 * NUM_EXPERTS
    assert_close(routing.weight_N.detach().view(20, -1).sum(dim=1), valid_T.double(), "sums")
    assert_close(routing.logits_TE.softmax(dim=-1), routing.scores_TE, "scores")


@pytest.mark.parametrize("build", [_lora_moe, _mole])
def test_the_frozen_network_gets_no_gradient_and_the_routers_get_one(build):
    """Reference 12.3 and 12.4."""
    layer = build()
    layer(tokens(9, WIDTH, torch.float64))[0].square().sum().backward()
    assert all(p.grad is None for p in layer.experts.base.parameters())
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name
    adapted = [p.requires_grad for part in ("gate", "up", "down") for p in getattr(layer.experts, part).parameters()]
    assert set(adapted) == {isinstance(layer, LoRAMoE)}


@pytest.mark.parametrize("build", [_lora_moe, _mole])
def test_padding_gets_zeros_and_changes_nobody(build):
    layer, x_TD, valid_T = build(), tokens(20, WIDTH, torch.float64), some_padding(20)
    x_TD[~valid_T] *= 100
    y_TD, routing = layer(x_TD, valid_T)
    assert_close(y_TD[valid_T], layer(x_TD[valid_T])[0], "outputs")
    assert y_TD[~valid_T].abs().sum() == 0
    assert not routing.kept_N[~routing.valid_N].any()


@pytest.mark.parametrize("build", [_lora_moe, _mole])
@pytest.mark.parametrize("num_tokens", [0, 1, 4096])
def test_any_number_of_tokens_runs_in_any_precision(build, num_tokens):
    for dtype in (torch.float32, torch.bfloat16):
        layer = build().to(dtype)
        x_TD = tokens(num_tokens, WIDTH, dtype).requires_grad_()
        y_TD, routing = layer(x_TD)
        y_TD.sum().backward()
        assert (y_TD.dtype, routing.scores_TE.dtype) == (dtype, torch.float32)
        assert y_TD.isfinite().all()
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_each_of_the_three_linear_maps_has_a_router_of_its_own():
    layer, x_TD = _lora_moe(), tokens(9, WIDTH, torch.float64)
    _, routing = layer(x_TD, None, Context(domain_T=torch.arange(9)))
    linear_GTE = routing.extras["linear_GTE"]
    assert_close(linear_GTE[0], (x_TD @ layer.router["gate"].weight.T).softmax(dim=-1), "gate")
    assert_close(linear_GTE[1], (x_TD @ layer.router["up"].weight.T).softmax(dim=-1), "up")
    assert layer.router["down"].weight.shape == (NUM_EXPERTS, HIDDEN)
    assert_close(routing.scores_TE, linear_GTE.mean(dim=0), "mean")
    assert routing.extras["domain_T"].tolist() == list(range(9))
    assert "domain_T" not in layer(x_TD)[1].extras


def test_the_logarithm_of_the_mean_stays_finite_where_every_probability_underflows():
    layer = _lora_moe().float()
    with torch.no_grad():
        for router in layer.router.values():
            router.weight.mul_(0)
            router.weight[0] = 1e4
    y_TD, routing = layer(torch.ones(2, WIDTH))
    assert routing.logits_TE.isfinite().all()
    assert y_TD.isfinite().all()


def test_one_lora_has_weight_one():
    """Reference 12.3."""
    layer, x_TD = _mole(num_experts=1), tokens(9, WIDTH, torch.float64)
    y_TD, routing = layer(x_TD)
    assert routing.weight_N.tolist() == [1.0] * 9
    assert_close(y_TD, layer.experts.base(x_TD) + layer.experts.alone(x_TD)[:, 0], "outputs")


def test_the_gate_does_not_see_how_large_the_outputs_are_together():
    """The joined outputs are normalised, so the weights of twice as large ones are the same."""
    layer, x_TD = _mole(), 30 * tokens(9, WIDTH, torch.float64)
    before = layer(x_TD)[1].weight_N
    with torch.no_grad():
        layer.experts.down.out_ERF.mul_(2)
    assert torch.allclose(layer(x_TD)[1].weight_N, before, atol=1e-4)


def test_a_high_temperature_makes_the_gate_undecided_and_a_low_one_hard():
    layer, x_TD = _mole(), tokens(9, WIDTH, torch.float64)
    for log_temperature, expected in ((20.0, 1 / NUM_EXPERTS), (-20.0, 1.0)):
        torch.nn.init.constant_(layer.log_temperature, log_temperature)
        assert layer(x_TD)[1].weight_N.view(9, -1)[:, 0].tolist() == pytest.approx([expected] * 9, abs=1e-6)


def test_every_parameter_is_met_by_every_token():
    network, low_rank = 3 * WIDTH * HIDDEN, 2 * (WIDTH + HIDDEN)
    assert _lora_moe().num_params == network + NUM_EXPERTS * (3 * low_rank + 2 * WIDTH + HIDDEN)
    assert _mole().num_params == network + NUM_EXPERTS * (3 * low_rank + NUM_EXPERTS * WIDTH) + 1
    for layer in (_lora_moe(), _mole()):
        assert layer.num_active_params == layer.num_params
        assert layer.num_experts == NUM_EXPERTS
        assert layer.kernel_report() == "LoRAExperts: no kernel, the low-rank products of all experts at once"


def test_fresh_routers_are_kaiming_s_and_fresh_maps_lora_s():
    layer = LoRAMoE(400, 100, LoRAExperts(4, 400, 100, rank=8, alpha=16.0))
    for weight, inputs in ((layer.router["gate"].weight, 400), (layer.router["down"].weight, 100)):
        assert float(weight.detach().abs().max()) <= 1 / math.sqrt(inputs)
        assert float(weight.detach().std()) == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.1)
    assert float(layer.experts.gate.into_EDR.detach().std()) == pytest.approx(1 / math.sqrt(1200), rel=0.1)
    assert layer.experts.gate.out_ERF.abs().sum() == 0
