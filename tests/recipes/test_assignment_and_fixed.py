"""Recipes that share tokens out evenly, or route by a fixed table or by chance: built as published."""

import pytest
import torch

from moesaic import ConfigError, Context, recipes
from moesaic.balance import LossTerm, depth_loss
from moesaic.core.init import orthogonal
from moesaic.dispatch import Sort
from moesaic.experts import MLPExperts, ResidualStack, SequentialExperts

FAMILY = ("base", "hash", "thor", "sinkhorn", "expert-choice", "pangu-sigma", "mod")
CAUSALITY = {
    "base": "in evaluation",
    "hash": "causal",
    "thor": "causal",
    "sinkhorn": "in evaluation",
    "expert-choice": "never",
    "pangu-sigma": "causal",
    "mod": "in evaluation",
}


@pytest.mark.parametrize("name", FAMILY)
def test_nothing_is_dropped_and_only_mod_has_a_loss(name):
    recipe = recipes.get(name)
    assert recipe.causality == CAUSALITY[name]
    assert isinstance(recipe.layer(8, hidden=6, num_experts=4).dispatch, Sort)
    loss = LossTerm(name="depth", loss=depth_loss, coefficient=0.01)
    assert recipe.balance == ((loss,) if name == "mod" else ())


PUBLISHED = [
    ("base", {"num_experts": 128, "top_k": 1, "sublayers": 1, "assign_tokens": 1024, "activation": "relu"}),
    ("hash", {"num_experts": 64, "top_k": 1, "vocab_size": 50_257, "seed": 42, "activation": "relu", "gated": False}),
    ("thor", {"num_experts": 2, "top_k": 1, "activation": "relu"}),
    ("sinkhorn", {"num_experts": 64, "top_k": 1, "activation": "gelu"}),
    ("expert-choice", {"num_experts": 64, "top_k": 2, "cap": None, "group": "batch", "activation": "gelu"}),
    ("pangu-sigma", {"num_experts": 640, "top_k": 1, "num_domains": None, "activation": "gelu"}),
    ("mod", {"num_experts": 1, "capacity": 0.125, "activation": "gelu"}),
]


@pytest.mark.parametrize(("name", "numbers"), PUBLISHED)
def test_the_published_numbers(name, numbers):
    recipe = recipes.get(name)
    layer = recipe.layer(4, hidden=2)
    assert {option: recipe.options[option] for option in numbers} == numbers
    assert layer.num_experts == numbers["num_experts"]
    assert isinstance(layer.experts, SequentialExperts if name == "base" else MLPExperts)


def test_base_starts_with_centroids_at_right_angles_and_experts_that_add_a_bias():
    layer = recipes.get("base").layer(32, hidden=8, num_experts=6)
    weight_ED = layer.router.weight.detach()
    torch.testing.assert_close(weight_ED @ weight_ED.T, 0.01 * torch.eye(6), atol=1e-6, rtol=0)
    assert all(isinstance(expert, ResidualStack) for expert in layer.experts)
    assert all(expert.sublayers[0].down.weight.abs().sum() == 0 for expert in layer.experts)
    assert layer.num_active_params == layer.router.weight.numel() + sum(
        p.numel() for p in layer.experts[0].parameters()
    )


def test_the_width_of_base_s_weights_leaves_what_is_published_to_start_at_0():
    """A model's initializer_range is not the router's business, nor that of matrices which start at 0."""
    torch.manual_seed(0)
    layer = recipes.get("base").layer(32, hidden=80, num_experts=6, init_std=0.3)
    weight_ED = layer.router.weight.detach()
    torch.testing.assert_close(weight_ED @ weight_ED.T, 0.01 * torch.eye(6), atol=1e-6, rtol=0)
    sublayer = layer.experts[0].sublayers[0]
    assert not sublayer.down.weight.any()
    assert float(sublayer.up.weight.detach().std()) == pytest.approx(0.3, rel=0.1)
    wide = recipes.get("base").layer(32, hidden=8, num_experts=60, gate_init_std=0.3)
    assert float(wide.router.weight.detach().std()) == pytest.approx(0.3, rel=0.1)


def test_centroids_at_right_angles_can_be_drawn_in_lower_precision():
    weight_ED = torch.empty(6, 32, dtype=torch.bfloat16)
    orthogonal(0.1)(weight_ED, 32)
    torch.testing.assert_close(weight_ED @ weight_ED.T, 0.01 * torch.eye(6, dtype=torch.bfloat16), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("factor", "rows"), [(0.5, 16), (1.5, 48), (2.0, 64), (None, 96)])
def test_experts_may_choose_any_number_of_tokens(factor, rows):
    """The paper's c, 0.5 in the least of its ablations: half of all tokens are taken, if by different experts."""
    torch.manual_seed(0)
    recipe = recipes.get("expert-choice")
    layer = recipe.layer(8, hidden=6, num_experts=4, top_k=3, capacity_factor=factor)
    y_TD, routing = layer(torch.randn(32, 8))
    assert routing.num_rows == rows
    assert routing.load_E.tolist() == [rows // 4] * 4
    assert layer.router.experts_per_token == rows / 32
    one = sum(parameter[0].numel() for parameter in layer.experts.parameters())
    assert layer.num_active_params == layer.router.weight.numel() + round(one * rows / 32)
    nobody_s_T = torch.bincount(routing.token_N, minlength=32) == 0
    assert not y_TD[nobody_s_T].any()
    assert int(nobody_s_T.sum()) >= 32 - rows


@pytest.mark.parametrize("factor", [0.0, -0.5, 4.5])
def test_an_average_that_cannot_be_is_refused(factor):
    with pytest.raises(ConfigError) as error:
        recipes.get("expert-choice").layer(8, hidden=6, num_experts=4, capacity_factor=factor)
    assert str(error.value) == (
        f"capacity_factor must be above 0 and at most num_experts=4, got {factor}. The paper has 0.5, 1 and 2."
    )


@pytest.mark.parametrize(("num_experts", "num_domains"), [(640, 4), (8, 4), (6, 1), (2, 1)])
def test_pangu_sigma_has_four_domains_where_they_divide_the_experts(num_experts, num_domains):
    layer = recipes.get("pangu-sigma").layer(4, hidden=2, num_experts=num_experts, vocab_size=10)
    assert layer.router.table_QV.shape == (num_domains, 10)


def test_pangu_sigma_s_experts_are_counted_as_published():
    """Reference 10.5: 8 layers of 640 experts of 2 * 5120 * 20480 are 1.0737T parameters."""
    with torch.device("meta"):
        layer = recipes.get("pangu-sigma").layer(5120, hidden=20480, vocab_size=10)
    assert 8 * sum(p.numel() for p in layer.experts.parameters()) == 1_073_741_824_000
    assert layer.num_active_params == 2 * 5120 * 20480


def test_a_submodel_of_one_domain_is_the_whole_on_its_texts():
    torch.manual_seed(0)
    layer = recipes.get("pangu-sigma").layer(6, hidden=5, num_experts=8, vocab_size=20, init_std=0.5)
    alone = recipes.get("pangu-sigma").layer(6, hidden=5, num_experts=2, vocab_size=20, num_domains=1)
    with torch.no_grad():
        for ours, theirs in zip(alone.experts.parameters(), layer.experts.parameters(), strict=True):
            ours.copy_(theirs[4:6])
        alone.router.table_QV.copy_(layer.router.table_QV[2:3] - 4)
    x_TD, id_T = torch.randn(15, 6), torch.randint(20, (15,))
    whole_TD, _ = layer(x_TD, None, Context(id_T=id_T, domain_T=torch.full((15,), 2)))
    assert torch.equal(alone(x_TD, None, Context(id_T=id_T))[0], whole_TD)
