"""MoE++, Residual-MoE and PR-MoE as published."""

import pytest
import torch

from moesaic import ConfigError, Context, recipes
from moesaic.balance import LossTerm, heterogeneous_loss, switch_loss
from moesaic.dispatch import Capacity, HeterogeneousCapacity
from moesaic.experts import ConstantExpert, CopyExpert, GatedExperts, MLPExperts, ZeroExpert
from moesaic.recipes.moe_plus_plus import special_experts
from tests.tolerances import assert_close


def test_moe_plus_plus_is_built_as_published():
    recipe = recipes.get("moe++")
    layer = recipe.layer(8, hidden=6)
    networks, special = layer.experts
    assert isinstance(networks, GatedExperts)
    assert networks.num_experts == 8
    assert [type(expert) for expert in special] == [ConstantExpert, ConstantExpert, CopyExpert, ZeroExpert]
    assert (layer.router.top_k, layer.router.num_special, layer.router.tau) == (2, 4, 0.75)
    assert layer.router.inner_weight is None
    assert isinstance(layer.dispatch, HeterogeneousCapacity)
    assert (layer.dispatch.factor, layer.dispatch.eval_factor) == (1.1, None)
    assert recipe.balance == (LossTerm(name="heterogeneous", loss=heterogeneous_loss, coefficient=0.01),)


@pytest.mark.parametrize(
    ("num_experts", "counts"),
    [(12, (2, 1, 1)), (20, (2, 1, 1)), (40, (6, 1, 1)), (8, (2, 1, 1)), (6, (1, 1, 1)), (4, (0, 1, 1)), (3, (0, 0, 1))],
)
def test_constant_copy_and_zero_experts_are_as_many_as_published_and_at_most_half(num_experts, counts):
    """Reference 18.1: 8 + 4, 16 + 4 and 32 + 8 experts."""
    assert special_experts(num_experts, None, None, None) == counts


def test_a_token_whose_choices_are_zero_and_copy_keeps_the_copy_s_share():
    """Reference 18.6, example 3: weights 0.6 and 0.4 give 0.4 x."""
    layer = recipes.get("moe++").layer(4, hidden=6, num_experts=4, num_constant=0).double().eval()
    x_TD = torch.ones(1, 4, dtype=torch.float64)
    with torch.no_grad():  # experts: two networks, copy, zero
        probability_E = torch.tensor([1e-9, 1e-9, 0.4, 0.6], dtype=torch.float64)
        layer.router.weight.copy_(probability_E.log()[:, None].expand(4, 4) / 4)
    y_TD, routing = layer(x_TD)
    assert routing.expert_N.tolist() == [3, 2]
    assert y_TD.tolist()[0] == pytest.approx([0.4] * 4, abs=1e-8)


def test_layers_of_moe_plus_plus_hand_their_logits_up():
    first, second = (recipes.get("moe++").layer(8, hidden=6, init_std=0.5) for _ in range(2))
    x_TD = torch.randn(5, 8)
    y_TD, below = first(x_TD)
    _, alone = second(y_TD)
    _, above = second(y_TD, None, Context(below_TE=below.logits_TE))
    expected_TE = alone.logits_TE + below.logits_TE @ second.router.below_weight.T
    assert_close(above.logits_TE, expected_TE, "logits")


def test_a_choice_of_a_zero_expert_is_counted_and_adds_nothing():
    layer = recipes.get("moe++").layer(4, hidden=6, num_experts=4, top_k=1).eval()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[3] = 10
    y_TD, routing = layer(torch.ones(3, 4))
    assert routing.load_E.tolist() == [0, 0, 0, 3]
    assert y_TD.abs().sum() == 0


def test_without_special_experts_moe_plus_plus_is_a_plain_mixture():
    options = {"num_constant": 0, "num_copy": 0, "num_zero": 0}
    layer = recipes.get("moe++").layer(4, hidden=6, num_experts=4, **options)
    assert isinstance(layer.experts, GatedExperts)
    assert layer.experts.num_experts == 4


def test_too_many_special_experts_are_refused():
    with pytest.raises(ConfigError) as error:
        recipes.get("moe++").layer(4, hidden=6, num_experts=4, num_constant=3)
    assert str(error.value) == (
        "num_constant, num_copy and num_zero must leave a feed-forward expert of num_experts=4, got 3, 1 and 1. "
        "Add experts, or take fewer special ones."
    )
    with pytest.raises(ConfigError) as error:
        recipes.get("moe++").layer(4, hidden=6, num_zero=-1)
    assert str(error.value) == "num_zero must be at least 0, got -1. MoE++ has 2 constant, 1 copy and 1 zero."


@pytest.mark.parametrize("name", ["residual-moe", "pr-moe"])
def test_residual_moe_is_built_as_published(name):
    recipe = recipes.get(name)
    layer = recipe.layer(8, hidden=6)
    assert (layer.router.num_experts, layer.router.top_k, layer.router.normalize) == (32, 1, "scores")
    assert isinstance(layer.experts, MLPExperts)
    assert layer.experts.activation.name == "gelu"
    assert isinstance(layer.dispatch, Capacity)
    assert (layer.dispatch.factor, layer.dispatch.eval_factor, layer.dispatch.minimum) == (1.0, 1.0, 4)
    assert layer.shared.gate_DF is None
    assert layer.shared.up_DF.shape == (8, 6)
    assert layer.mix is None
    assert recipe.balance == (LossTerm(name="switch", loss=switch_loss, coefficient=0.01),)


@pytest.mark.parametrize(("combine", "share"), [("sum", 1.0), ("learned", 0.5)])
def test_with_silent_experts_the_layer_is_its_dense_network_or_half_of_it(combine, share):
    """Reference 8.5, example 1."""
    layer = recipes.get("residual-moe").layer(8, hidden=6, num_experts=4, combine=combine, init_std=0.5)
    with torch.no_grad():
        layer.experts.down_EFD.zero_()
        if layer.mix is not None:
            layer.mix.mix_weight.zero_()
    x_TD = torch.randn(9, 8)
    assert_close(layer(x_TD)[0], share * layer.shared(x_TD), "outputs")


def test_an_unknown_way_to_combine_is_refused():
    with pytest.raises(ConfigError) as error:
        recipes.get("residual-moe").layer(8, hidden=6, combine="max")
    assert str(error.value) == "combine must be 'sum' or 'learned', got 'max'. The paper has 'sum'."


@pytest.mark.parametrize(
    ("num_layers", "experts"),
    [(12, [32] * 10 + [64] * 2), (4, [32, 32, 64, 64]), (3, [32, 32, 64]), (2, [32, 64]), (1, [32])],
)
def test_the_last_two_layers_of_a_pyramid_have_twice_the_experts(num_layers, experts):
    """Reference 8.2 and 8.5, example 2: 350M+PR-MoE-32/64 has 10 layers of 32 experts and 2 of 64."""
    recipe = recipes.get("pr-moe")
    options = {"num_experts": 32, "combine": "sum"}
    by_depth = [recipe.by_depth(options, index, num_layers) for index in range(num_layers)]
    assert [layer["num_experts"] for layer in by_depth] == experts
    assert options["num_experts"] == 32
    assert {layer["combine"] for layer in by_depth} == {"sum"}


@pytest.mark.parametrize(("width", "num_experts", "billions"), [(1024, 32, 4.12), (2048, 64, 31.38)])
def test_the_parameters_of_pr_moe_are_those_of_the_published_models(width, num_experts, billions):
    """Reference 8.2: 350M+PR-MoE-32/64 and 1.3B+PR-MoE-64/128, the other 12 of 24 blocks dense."""
    recipe, total = recipes.get("pr-moe"), 0
    for index in range(12):
        options = recipe.by_depth({"num_experts": num_experts}, index, 12)
        with torch.device("meta"):
            total += recipe.layer(width, hidden=4 * width, **options).num_params
    rest = 24 * 4 * width**2 + 12 * 8 * width**2 + (51200 + 2048) * width
    assert round((total + rest) / 1e9, 2) == billions
