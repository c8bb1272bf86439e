"""Soft MoE, SMEAR, Lory, MoLE, LoRAMoE and MixLoRA as published."""

import pytest
import torch

from moesaic import MoELayer, recipes
from moesaic.balance import LocalizedLoss, LossTerm, product_loss, switch_loss
from moesaic.experts import GatedExperts, MLPExperts, SharedExpert
from tests.tolerances import assert_close


def test_soft_moe_is_built_as_published():
    recipe = recipes.get("soft-moe")
    layer = recipe.layer(400, hidden=100, num_experts=8)
    assert recipe.options["num_experts"] == 128
    assert layer.slot_DES.shape == (400, 8, 1)
    assert layer.noise_std == 0
    assert float(layer.scale.detach()) == 1
    assert isinstance(layer.experts, MLPExperts)
    assert layer.experts.activation.name == "gelu"
    assert float(layer.experts.up_EDF.detach().std()) == pytest.approx(0.88 / 400**0.5, rel=0.05)
    assert (recipe.causality, recipe.balance) == ("never", ())


def test_smear_is_built_as_published():
    recipe = recipes.get("smear")
    layer = recipe.layer(32, hidden=4)
    assert (layer.num_experts, layer.expert_dropout, layer.segment) == (8, 0.1, None)
    assert layer.router.weight_norm is not None
    assert isinstance(layer.experts, MLPExperts)
    assert layer.experts.activation.name == "silu"
    assert (recipe.causality, recipe.balance) == ("never", ())


def test_lory_is_built_as_published():
    recipe = recipes.get("lory")
    layer = recipe.layer(32, hidden=4)
    assert (layer.num_experts, layer.expert_dropout, layer.segment) == (8, 0.0, 256)
    assert layer.router.weight_norm is None
    assert isinstance(layer.experts, GatedExperts)
    assert (recipe.causality, recipe.balance) == ("never", ())


def test_lora_moe_is_built_as_published():
    recipe = recipes.get("lora-moe")
    layer = recipe.layer(32, hidden=20)
    for part, inputs, outputs in (("gate", 32, 20), ("up", 32, 20), ("down", 20, 32)):
        low_rank = getattr(layer.experts, part)
        assert low_rank.into_EDR.shape == (8, inputs, 4)
        assert low_rank.out_ERF.shape == (8, 4, outputs)
        assert (low_rank.scale, low_rank.dropout) == (8.0, 0.05)
    assert recipe.balance == (LossTerm(name="localized", loss=LocalizedLoss(delta=0.1), coefficient=0.1),)


def test_mixlora_is_built_as_published():
    recipe = recipes.get("mixlora")
    layer = recipe.layer(32, hidden=20)
    assert isinstance(layer, MoELayer)
    assert (layer.router.num_experts, layer.router.top_k, layer.router.normalize) == (8, 2, "chosen")
    assert layer.experts.gate.into_EDR.shape == (8, 32, 16)
    assert (layer.experts.gate.scale, layer.experts.gate.dropout) == (2.0, 0.05)
    assert recipe.balance == (LossTerm(name="switch", loss=switch_loss, coefficient=0.01),)


def test_mole_is_built_as_published():
    recipe = recipes.get("mole")
    layer = recipe.layer(32, hidden=20)
    assert not any(p.requires_grad for p in layer.experts.parameters())
    assert layer.router.weight.shape == (8, 8 * 32)
    assert float(layer.log_temperature.detach()) == 0
    assert recipe.balance == (LossTerm(name="product", loss=product_loss, coefficient=0.5),)


@pytest.mark.parametrize("name", ["lora-moe", "mixlora", "mole"])
def test_whatever_the_width_of_fresh_weights_a_fresh_layer_is_its_base_network(name):
    """Reference 12.4 and 12.5, as a dense model that is made sparse sees it."""
    for init_std in (None, 0.3):
        layer = recipes.get(name).layer(8, hidden=6, num_experts=4, init_std=init_std).double()
        dense = SharedExpert(8, 6, init=lambda weight, _: torch.nn.init.normal_(weight)).double()
        layer.experts.load_base(dense.gate_DF, dense.up_DF, dense.down_FD)
        x_TD = torch.randn(9, 8, dtype=torch.float64)
        assert_close(layer(x_TD)[0], dense(x_TD), "outputs")


def test_the_network_of_low_rank_experts_counts_once_among_the_parameters_that_a_token_meets():
    layer = recipes.get("mixlora").layer(8, hidden=6, num_experts=4, top_k=2, rank=2)
    network, one_expert, router = 3 * 8 * 6, 3 * 2 * (8 + 6), 4 * 8
    assert layer.num_params == network + 4 * one_expert + router
    assert layer.num_active_params == network + 2 * one_expert + router


@pytest.mark.parametrize("name", ["soft-moe", "smear", "lory"])
def test_differentiable_designs_pass_the_check_of_their_gradient(name):
    """Reference, section 24."""
    options = {"segment": 2} if name == "lory" else {}
    layer = recipes.get(name).layer(3, hidden=2, num_experts=2, kernel="reference", init_std=0.7, **options)
    layer.double().eval()
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    if name == "lory":  # the first segment's weights are cut off by design: no true gradient of its tokens
        x_TD.data[:2] = 0
        assert torch.autograd.gradcheck(lambda later_TD: layer(torch.cat([x_TD[:2].detach(), later_TD]))[0], x_TD[2:])
    else:
        assert torch.autograd.gradcheck(lambda batch_TD: layer(batch_TD)[0], x_TD)
