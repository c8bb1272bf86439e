import math

import pytest
import torch

from moesaic import Context, Routing, recipes
from moesaic.balance import LossTerm, gshard_loss, switch_loss, z_loss
from moesaic.experts import GatedExperts, MLPExperts, SharedExpert
from moesaic.routers import SampledTopKRouter, TopKRouter


def every_line(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names or ("gshard", "glam", "st-moe"))


def gates_of(name: str, gates: list[float], **options):
    """The recipe with a router that gives the token (1, 0) these probabilities."""
    layer = recipes.get(name).layer(2, hidden=3, num_experts=len(gates), **options)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([gates, [0.0] * len(gates)]).t())
        layer.router.weight[:, 0].log_()
    return layer


@pytest.mark.parametrize(
    ("name", "num_experts", "threshold", "factors", "experts", "activation"),
    [
        ("gshard", 2048, 0.5, (2.0, 2.0), MLPExperts, "relu"),
        ("glam", 64, 0.5, (2.0, 2.0), MLPExperts, "gelu"),
        ("st-moe", 64, 0.2, (1.25, 2.0), GatedExperts, "gelu_tanh"),
    ],
)
def test_the_gshard_line_is_built_as_published(name, num_experts, threshold, factors, experts, activation):
    recipe = recipes.get(name)
    layer = recipe.layer(8, hidden=6)
    assert isinstance(layer.router, SampledTopKRouter)
    assert (layer.router.num_experts, layer.router.top_k, layer.router.threshold) == (num_experts, 2, threshold)
    assert layer.router.jitter == 0.0
    assert (layer.dispatch.factor, layer.dispatch.eval_factor, layer.dispatch.minimum) == (*factors, 4)
    assert (layer.dispatch.group, layer.dispatch.per, layer.dispatch.drop) == ("sequence", "token", "position")
    assert type(layer.experts) is experts
    assert layer.experts.activation.name == activation
    assert layer.shared is None
    assert recipe.losses[0] == LossTerm(name="gshard", loss=gshard_loss, coefficient=0.01)
    assert recipe.layer(8, hidden=6, num_experts=4, group_size=1024).dispatch.group == 1024


def test_st_moe_adds_the_z_loss_and_a_dense_network_on_the_norm_of_what_came_before():
    recipe = recipes.get("st-moe")
    assert recipe.losses[1:] == (LossTerm(name="z", loss=z_loss, coefficient=1e-3),)
    layer = recipe.layer(8, hidden=6, num_experts=4).eval()
    bare = recipe.layer(8, hidden=6, num_experts=4, sparse_dense=False).eval()
    bare.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("after.")})
    x_TD = torch.randn(9, 8)
    seen_TD = x_TD + bare(x_TD)[0]
    normed_TD = seen_TD / (seen_TD.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(layer(x_TD)[0], bare(x_TD)[0] + layer.after.ffn(normed_TD), atol=1e-5)
    assert layer.after.ffn.up_DF.shape == (8, 6)


@pytest.mark.parametrize(("name", "scale"), [("gshard", 1.0), ("glam", 1.0), ("st-moe", 0.1)])
def test_weights_start_at_the_published_share_of_the_variance(name, scale):
    """Reference 7.4: ST-MoE starts as Switch, at a tenth of the usual variance; cut off at two deviations."""
    layer = recipes.get(name).layer(400, hidden=100, num_experts=8)
    for weight, fan_in in ((layer.router.weight, 400), (layer.experts.up_EDF, 400), (layer.experts.down_EFD, 100)):
        std = (scale / fan_in) ** 0.5
        assert weight.detach().abs().max().item() <= 2 * std
        assert weight.detach().std().item() == pytest.approx(0.88 * std, rel=0.05)


def test_openmoe_is_built_as_published():
    recipe = recipes.get("openmoe")
    layer = recipe.layer(8, hidden=6)
    assert type(layer.router) is TopKRouter
    assert (layer.router.num_experts, layer.router.top_k, layer.router.normalize) == (32, 2, "scores")
    assert (layer.dispatch.factor, layer.dispatch.eval_factor, layer.dispatch.per) == (1.25, 2.0, "row")
    assert isinstance(layer.shared, SharedExpert)
    assert layer.shared.up_DF.shape == (8, 6)
    # 0.01 on flaxformer's loss, which counts both choices for each token and is 2 at balance.
    assert recipe.balance == (
        LossTerm(name="switch", loss=switch_loss, coefficient=0.02),
        LossTerm(name="z", loss=z_loss, coefficient=1e-4),
    )


def test_minimax_01_is_built_as_published():
    recipe = recipes.get("minimax-01")
    layer = recipe.layer(8, hidden=6)
    assert (layer.router.num_experts, layer.router.top_k, layer.router.normalize) == (32, 2, "chosen")
    assert layer.shared is None
    assert recipe.balance == (LossTerm(name="switch", loss=switch_loss, coefficient=0.01),)


def test_the_worked_example_of_gshard():
    """Reference 4.5, example 1: four tokens with g = (0.8, 0.2), C = 2."""
    torch.manual_seed(0)
    layer = gates_of("gshard", [0.8, 0.2], capacity_factor=1.0, min_capacity=0)
    second = []
    for _ in range(300):
        _, routing = layer(torch.tensor([[1.0, 0.0]]).expand(4, -1))
        first_N = routing.choice_N == 0
        assert routing.kept_N[first_N].tolist() == [True, True, False, False]
        assert routing.expert_N[first_N].tolist() == [0] * 4
        assert routing.weight_N[first_N].tolist() == pytest.approx([0.8] * 4)
        winners = int((~first_N).sum())
        assert routing.kept_N[~first_N].tolist() == ([True] * winners)[:2] + [False] * max(0, winners - 2)
        assert routing.weight_N[~first_N].tolist() == pytest.approx([0.2] * winners)
        second.append(winners / 4)
    assert sum(second) / 300 == pytest.approx(0.4, abs=4 * math.sqrt(0.4 * 0.6 / 1200))
    assert float(gshard_loss(routing).detach()) == pytest.approx(1.6)


@every_line()
def test_combine_weights_add_up_to_1_exactly_where_both_choices_are_kept(name):
    """Reference 4.5, example 2."""
    torch.manual_seed(0)
    layer = recipes.get(name).layer(8, hidden=3, num_experts=6, init_std=0.5, capacity_factor=1.0, min_capacity=1)
    sequence_T = torch.arange(60) // 20
    _, routing = layer(torch.randn(60, 8), None, Context(sequence_T=sequence_T))
    kept_T = torch.bincount(routing.token_N[routing.kept_N], minlength=60)
    sum_T = torch.zeros(60).index_add(0, routing.token_N, routing.weight_N.detach() * routing.kept_N)
    assert set(kept_T.tolist()) == {0, 1, 2}
    assert sum_T[kept_T == 2].tolist() == pytest.approx([1.0] * int((kept_T == 2).sum()))
    assert (sum_T[kept_T < 2] < 1).all()
    capacity = math.ceil(20 / 6)
    assert layer.dispatch.capacity(routing).tolist() == [capacity] * 3
    for s in range(3):
        for e in range(6):
            assert (
                int((routing.kept_N & (routing.expert_N == e) & (sequence_T[routing.token_N] == s)).sum()) <= capacity
            )


@every_line("gshard", "glam")
def test_with_room_for_all_and_no_chance_it_is_the_dense_mixture_of_the_two_best(name):
    """Reference 4.5, example 3."""
    torch.manual_seed(0)
    options = {"num_experts": 5, "init_std": 0.5, "capacity_factor": 5.0, "second_threshold": 0.0}
    layer = recipes.get(name).layer(8, hidden=3, **options).double()
    x_TD = torch.randn(20, 8, dtype=torch.float64)
    y_TD, routing = layer(x_TD)
    assert routing.kept_N.all()
    best = (x_TD @ layer.router.weight.t()).softmax(dim=-1).topk(2, dim=-1)
    hidden = torch.einsum("td,edf->tef", x_TD, layer.experts.up_EDF)
    out_TED = torch.einsum("tef,efd->ted", layer.experts.activation.forward(hidden), layer.experts.down_EFD)
    weight_T2 = best.values / best.values.sum(dim=-1, keepdim=True)
    expected_TD = sum(weight_T2[:, k, None] * out_TED[torch.arange(20), best.indices[:, k]] for k in range(2))
    assert torch.allclose(y_TD, expected_TD, atol=1e-12)


@every_line("gshard", "glam")
def test_a_factor_of_2_never_drops_a_row_of_balanced_top_2(name):
    """Reference, section 6."""
    dispatch = recipes.get(name).layer(4, hidden=2, num_experts=8, min_capacity=0).dispatch
    expert_TK = torch.stack([torch.arange(64) % 8, (torch.arange(64) + 3) % 8], dim=-1)
    scores_TE = torch.full((64, 8), 0.125)
    routing = Routing.from_choices(expert_TK, torch.full((64, 2), 0.5), scores_TE, scores_TE)
    assert dispatch(routing).kept_N.all()


def test_a_training_factor_of_st_moe_drops_rows_even_of_balanced_top_2():
    """Reference 0.5: 1.25 S / E places for 2 S / E rows."""
    dispatch = recipes.get("st-moe").layer(4, hidden=2, num_experts=8, min_capacity=0).dispatch
    expert_TK = torch.stack([torch.arange(64) % 8, (torch.arange(64) + 3) % 8], dim=-1)
    scores_TE = torch.full((64, 8), 0.125)
    routing = Routing.from_choices(expert_TK, torch.full((64, 2), 0.5), scores_TE, scores_TE)
    assert int(dispatch(routing).kept_N.sum()) == 8 * 10
    assert dispatch.eval()(routing).kept_N.all()


@every_line()
def test_active_parameters_grow_with_experts_by_the_router_alone(name):
    """Reference, section 6."""
    small, large = (recipes.get(name).layer(8, hidden=6, num_experts=n) for n in (4, 64))
    assert large.num_active_params - small.num_active_params == 60 * 8


@every_line()
def test_first_choices_queue_before_second_ones_and_more_room_drops_no_more(name):
    """Reference 7.7, examples 3 and 4."""
    torch.manual_seed(0)
    layer = recipes.get(name).layer(8, hidden=3, num_experts=6, init_std=0.5, min_capacity=0).eval()
    x_TD, dropped = torch.randn(60, 8), []
    for factor in (0.5, 1.0, 1.25, 2.0, 4.0):
        layer.dispatch.eval_factor = factor
        _, routing = layer(x_TD)
        for e in range(6):
            first_N = (routing.expert_N == e) & (routing.choice_N == 0)
            if not routing.kept_N[first_N].all():
                assert not routing.kept_N[(routing.expert_N == e) & (routing.choice_N == 1)].any()
        dropped.append(int((~routing.kept_N).sum()))
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[0] > 0


@every_line()
def test_sequences_of_a_batch_do_not_take_each_other_s_places(name):
    torch.manual_seed(0)
    layer = recipes.get(name).layer(8, hidden=3, num_experts=6, init_std=0.5, min_capacity=1, eval_capacity_factor=0.6)
    x_TD, layer = torch.randn(30, 8), layer.eval()
    together, _ = layer(x_TD, None, Context(sequence_T=torch.arange(30) // 10))
    apart = torch.cat([layer(part)[0] for part in x_TD.split(10)])
    assert torch.allclose(together, apart, atol=1e-6)
    assert not torch.allclose(layer(x_TD)[0], apart, atol=1e-3)


def test_the_z_loss_of_the_worked_examples():
    """Reference 7.7, examples 1 and 2."""

    def z_of(logits: list[float]) -> float:
        logits_TE = torch.tensor([logits], dtype=torch.float64)
        routing = Routing.from_choices(torch.tensor([[0]]), torch.ones(1, 1), logits_TE, logits_TE.softmax(dim=-1))
        return float(z_loss(routing))

    assert z_of([0.0, 0.0]) == pytest.approx(0.4805, abs=5e-5)
    assert z_of([1.0, 2.0, 3.0]) == pytest.approx(11.612, abs=5e-4)
    assert z_of([-math.log(3)] * 3) == pytest.approx(0.0, abs=1e-12)
    assert z_of([2.0, 3.0, 4.0]) > z_of([1.0, 2.0, 3.0])
