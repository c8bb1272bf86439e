import pytest
import torch

from moesaic import ConfigError, recipes
from moesaic.balance import LossTerm, importance_cv2, load_cv2, threshold_loss
from moesaic.dispatch import Sort
from moesaic.experts import GatedExperts, MLPExperts, SharedExpert
from moesaic.routers import BatchwiseRouter, HierarchicalRouter, NoisyTopKRouter
from tests.laws.settings import Setting


def test_shazeer_2017_is_built_as_published():
    recipe = recipes.get("shazeer-2017")
    layer = recipe.layer(40, hidden=10)
    router = layer.router
    assert isinstance(router, NoisyTopKRouter)
    assert (router.num_experts, router.top_k, router.noise_epsilon, router.scale) == (256, 4, 0.0, 1.0)
    assert router.weight.abs().sum() == router.noise_ED.abs().sum() == 0
    assert router.mix_EE is None
    assert isinstance(layer.experts, MLPExperts)
    assert layer.experts.activation.name == "relu"
    assert isinstance(layer.dispatch, Sort)
    assert layer.shared is None
    assert recipe.balance == (
        LossTerm(name="importance", loss=importance_cv2, coefficient=0.1),
        LossTerm(name="load", loss=load_cv2, coefficient=0.1),
    )


@pytest.mark.parametrize("name", ["shazeer-2017", "hierarchical-2017", "llama-moe", "grok-1"])
def test_the_width_of_the_experts_leaves_gates_that_start_at_0_alone(name):
    torch.manual_seed(0)
    layer = recipes.get(name).layer(40, hidden=30, num_experts=8, top_k=2, init_std=0.3)
    assert float(layer.experts.up_EDF.detach().std()) == pytest.approx(0.3, rel=0.1)
    for part, weight in layer.router.named_parameters():
        # LLaMA-MoE draws its gate as the rest of the model, and starts the noise alone at 0.
        width = 0.3 if name == "llama-moe" and "noise" not in part else 0.0
        assert float(weight.detach().std()) == pytest.approx(width, rel=0.4), part
    drawn = recipes.get(name).layer(40, hidden=30, num_experts=8, top_k=2, init_std=0.3, gate_init_std=0.05)
    assert float(drawn.experts.up_EDF.detach().std()) == pytest.approx(0.3, rel=0.1)
    for part, weight in drawn.router.named_parameters():
        assert float(weight.detach().std()) == pytest.approx(0.05, rel=0.4), part


@pytest.mark.parametrize("name", ["shazeer-2017", "hierarchical-2017", "llama-moe", "grok-1", "base"])
def test_a_gate_of_negative_width_is_refused(name):
    with pytest.raises(ConfigError) as error:
        recipes.get(name).layer(8, hidden=6, num_experts=8, gate_init_std=-0.5)
    assert str(error.value) == "gate_init_std must be at least 0, got -0.5. Leave it out for the published start."


def test_hierarchical_2017_is_built_as_published():
    recipe = recipes.get("hierarchical-2017")
    layer = recipe.layer(8, hidden=6)
    router = layer.router
    assert isinstance(router, HierarchicalRouter)
    assert (router.num_experts, router.num_groups) == (256, 16)
    assert (router.groups_per_token, router.members_per_token, router.experts_per_token) == (2, 2, 4.0)
    assert all(parameter.abs().sum() == 0 for parameter in router.parameters())
    assert recipe.balance == recipes.get("shazeer-2017").balance


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups"),
    [
        (256, 2, 16),
        (1024, 2, 16),
        (4096, 2, 16),
        (64, 2, 8),
        (16, 2, 4),
        (8, 2, 4),
        (4, 2, 2),
        (12, 3, 4),
        (7, 2, 1),
        (8, 5, 1),
    ],
)
def test_hierarchical_2017_leaves_both_levels_something_to_choose_where_it_can(num_experts, top_k, num_groups):
    router = recipes.get("hierarchical-2017").layer(4, hidden=2, num_experts=num_experts, top_k=top_k).router
    assert router.num_groups == num_groups
    assert router.members_per_token == top_k
    assert router.groups_per_token == (1 if num_groups == 1 else top_k)


def test_groups_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ConfigError) as error:
        recipes.get("hierarchical-2017").layer(4, hidden=2, num_experts=10, num_groups=3)
    assert str(error.value) == (
        "num_groups must divide num_experts=10, got 3. Change one so that every group holds as many experts."
    )


def test_strictly_balanced_2017_is_built_as_published():
    recipe = recipes.get("strictly-balanced-2017")
    layer = recipe.layer(8, hidden=6)
    assert isinstance(layer.router, BatchwiseRouter)
    assert (layer.router.num_experts, layer.router.top_k) == (256, 4)
    assert layer.router.threshold_E.tolist() == [1 / 256] * 256
    assert recipe.causality == "in evaluation"
    assert recipe.balance == (LossTerm(name="threshold", loss=threshold_loss, coefficient=0.1),)


@pytest.mark.parametrize(("num_experts", "top_k", "scale"), [(16, 4, 4.0), (8, 2, 4.0), (16, 2, 8.0)])
def test_llama_moe_is_built_as_published(num_experts, top_k, scale):
    """Reference 14.1: the three released models."""
    recipe = recipes.get("llama-moe")
    layer = recipe.layer(8, hidden=688, num_experts=num_experts, top_k=top_k)
    router = layer.router
    assert (router.scale, router.noise_epsilon) == (scale, 0.01)
    assert router.mix_EE.shape == (num_experts, num_experts)
    assert router.noise_ED.abs().sum() == 0
    assert isinstance(layer.experts, GatedExperts)
    assert layer.experts.activation.name == "silu"
    assert (recipe.options["num_experts"], recipe.options["top_k"]) == (16, 4)
    assert [(term.name, term.coefficient) for term in recipe.balance] == [("importance", 0.01), ("load", 0.01)]


def test_llama_moe_with_every_slice_at_weight_1_is_the_dense_network():
    """Reference 14.1: an undecided gate over all E slices, scaled by E."""
    dense = SharedExpert(5, 12).double()
    layer = recipes.get("llama-moe").layer(5, hidden=3, num_experts=4, top_k=4, scale=4.0).double().eval()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.experts.gate_EDF.copy_(dense.gate_DF.view(5, 4, 3).transpose(0, 1))
        layer.experts.up_EDF.copy_(dense.up_DF.view(5, 4, 3).transpose(0, 1))
        layer.experts.down_EFD.copy_(dense.down_FD.view(4, 3, 5))
    x_TD = torch.randn(9, 5, dtype=torch.float64)
    assert torch.allclose(layer(x_TD)[0], dense(x_TD), atol=1e-12)
    layer.router.scale = 1.0  # what the documented E / K comes to here
    assert torch.allclose(layer(x_TD)[0], dense(x_TD) / 4, atol=1e-12)


@pytest.mark.parametrize("name", ["shazeer-2017", "hierarchical-2017", "llama-moe"])
def test_the_losses_balance_a_lopsided_router(name):
    """As in table 6 of the paper, in small: with the losses the busiest expert comes down."""
    torch.manual_seed(0)
    layer = recipes.get(name).layer(8, hidden=4, num_experts=16, top_k=2, init_std=0.1, gate_init_std=0.1)
    with torch.no_grad():
        layer.router.weight[:3] += 0.5
    x_TD = torch.randn(400, 8) + 1
    terms = recipes.get(name).losses
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.02)
    before_E = layer.router.eval()(x_TD).load_E.double()
    layer.router.train()
    for _ in range(80):
        optimizer.zero_grad()
        routing = layer.router(x_TD)
        sum(term(routing) for term in terms).backward()
        optimizer.step()
    after_E = layer.router.eval()(x_TD).load_E.double()
    assert before_E.std() / before_E.mean() > 1.0
    assert after_E.std() < 0.7 * before_E.std()


@pytest.mark.parametrize("name", ["shazeer-2017", "hierarchical-2017", "strictly-balanced-2017", "llama-moe", "gshard"])
@pytest.mark.parametrize("training", [True, False])
def test_gates_run_in_float32_under_autocast(name, training):
    torch.manual_seed(0)
    layer = Setting(name, {"num_experts": 8, "top_k": 2}).layer().train(training)
    x_TD = torch.randn(200, 8)
    torch.manual_seed(1)
    expected = layer.router(x_TD)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        _, routing = layer(x_TD)
    for column in ("expert_N", "weight_N", "logits_TE", "scores_TE"):
        assert torch.equal(getattr(routing, column), getattr(expected, column)), column
    assert routing.weight_N.dtype == torch.float32
