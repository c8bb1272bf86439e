"""Upcycling: what the dense model computes is kept where that is promised, and measured where it is not."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic as mz
from moesaic import recipes
from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.grow.upcycle import Upcycling, upcycle, upcycling, virtual_groups
from moesaic.convert.layout import room
from moesaic.convert.proof.probe import measure, probe_batch
from moesaic.convert.run import convert
from moesaic.convert.weights import parts
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.hf import moe_layers, observe
from tests.convert import backbones
from tests.hf.tiny import build

# Weights of a token add up to one number, whatever the router says.
KEEPING = (
    "mixtral",
    "dbrx",
    "qwen3-moe",
    "minimax-01",
    "arctic",
    "skywork",
    "attention",
    "llama-moe",
    "deepseek-v3",
    "gpt-oss",
)
# They are raw scores, or go into the expert's input.
MEASURED = (
    "olmoe",
    "deepseek-moe",
    "deepseek-v2",
    "qwen1.5-moe",
    "jamba",
    "openmoe",
    "llama4",
    "top-p",
    "ds-moe",
    "relu",
)


def numbers(recipe, num_experts=8, top_k=2):
    known = recipes.get(recipe).options
    given = {"num_experts": num_experts} if "num_experts" in known else {}
    return given | ({"top_k": top_k} if known.get("top_k", 1) != 1 else {})


def plain():
    """A model whose networks have no gate and no biases."""
    return build("t5", feed_forward_proj="relu")


def logits(model, double=True):
    model = copy.deepcopy(model).double() if double else model
    return measure(model, probe_batch(model.config, "random")).logits


def gap(dense, sparse):
    return float((logits(dense) - logits(sparse)).abs().max())


# --- the function is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", KEEPING)
def test_copies_keep_the_function_where_weights_add_up(recipe):
    dense = build("llama")
    made = upcycle(dense, recipe, **numbers(recipe))
    assert made.receipt.promised in (1e-5, pytest.approx(1e-4))
    assert made.receipt.largest_logit_difference < 2e-6
    assert gap(dense, made.model) == pytest.approx(made.receipt.largest_logit_difference, abs=1e-9)
    assert not any(part.training for part in made.model.modules())


@pytest.mark.parametrize("recipe", KEEPING)
def test_in_float64_nothing_is_left_of_the_difference_but_what_transformers_computes_in_float32(recipe):
    dense = build("llama").double()
    made = upcycle(dense, recipe, **numbers(recipe))
    # Llama's norms work in float32: one of them rounds a number the other way now and then.
    assert made.receipt.largest_logit_difference < 2e-7
    assert made.receipt.promised == 1e-5


@pytest.mark.parametrize("recipe", ["dense", "gshard", "shazeer-2017", "hierarchical-2017", "hash", "reinforce"])
def test_plain_networks_are_kept_in_plain_recipes(recipe):
    options = {"vocab_size": 61} if recipe == "hash" else {}
    if recipe == "gshard":
        options = {"capacity_factor": 8.0, "eval_capacity_factor": 8.0}
    made = upcycle(plain(), recipe, **numbers(recipe), **options)
    assert made.receipt.promised is not None
    assert made.receipt.largest_logit_difference < 2e-6


def test_merged_experts_are_kept_too_and_warn_of_what_a_language_model_sees():
    for dense, recipe in ((build("llama"), "lory"), (plain(), "smear")):
        with pytest.warns(UserWarning, match=f"In recipe {recipe} a token's experts depend on later tokens"):
            made = upcycle(dense, recipe, num_experts=4)
        assert made.receipt.promised == 1e-5
        assert made.receipt.largest_logit_difference < 2e-6


@pytest.mark.parametrize("recipe", ["mixtral", "deepseek-v3", "llama-moe", "skywork", "gpt-oss", "arctic"])
@pytest.mark.parametrize("granularity", [2, 3, 4])
def test_virtual_groups_keep_the_function_with_the_factor_in_the_down_projection(recipe, granularity):
    dense = build("llama")
    made = upcycle(dense, recipe, **numbers(recipe, 4 * granularity, 2 * granularity), granularity=granularity)
    assert made.receipt.promised is not None
    assert made.receipt.largest_logit_difference < 2e-6


@pytest.mark.parametrize(("num_experts", "top_k", "granularity"), [(8, 4, 2), (16, 4, 4), (12, 6, 3), (8, 2, 1)])
def test_the_factor_is_the_published_one(num_experts, top_k, granularity):
    """G where weights are normalised over the chosen, E G / K where they are scores of a router that says nothing."""
    dense = build("llama")
    options = {"num_experts": num_experts, "top_k": top_k, "granularity": granularity}
    down_FD = dense.state_dict()["model.layers.0.mlp.down_proj.weight"].T
    for recipe, factor, extra in (
        ("mixtral", granularity, {}),
        ("olmoe", num_experts * granularity / top_k, {"router_std": 0.0}),
    ):
        made = upcycle(dense, recipe, **options, **extra)
        first_FD = moe_layers(made.model)["model.layers.0.mlp"].experts.down_EFD[0]
        torch.testing.assert_close(first_FD, factor * down_FD[: len(first_FD)])
        assert made.receipt.largest_logit_difference < 2e-6
        assert made.receipt.promised is not None


@pytest.mark.parametrize("recipe", ["deepseek-v3", "deepseek-moe", "qwen1.5-moe", "llama4"])
def test_the_dense_network_may_become_the_shared_expert(recipe):
    dense = build("llama")
    num_shared = {"deepseek-moe": 2, "qwen1.5-moe": 4}.get(recipe, 1)
    made = upcycle(dense, recipe, **numbers(recipe, 8, 4), shared="dense", granularity=num_shared)
    assert made.receipt.promised == 1e-5
    assert made.receipt.largest_logit_difference < 1e-6
    layer = moe_layers(made.model)["model.layers.0.mlp"]
    assert not layer.experts.down_EFD.any()
    assert layer.experts.up_EDF.any()
    up_FD = dense.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(layer.shared.up_DF, up_FD.T)


def test_a_shared_expert_that_is_silent_learns_at_once():
    made = upcycle(build("llama"), "deepseek-v3", num_experts=4, top_k=2)
    model = made.model.train()
    ids = torch.randint(3, 61, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    shared = moe_layers(model)["model.layers.0.mlp"].shared
    assert not shared.down_FD.any()
    assert shared.down_FD.grad.abs().max() > 0


def test_biased_networks_have_a_home_in_gpt_oss():
    dense = build("llama", mlp_bias=True)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    for granularity in (1, 2):
        made = upcycle(dense, "gpt-oss", num_experts=8, top_k=4, granularity=granularity)
        assert made.receipt.promised == pytest.approx(1e-4)
        assert made.receipt.largest_logit_difference < 3e-6


def test_half_precision_copies_are_bitwise_and_promised_only_with_a_factor_that_rounds_nothing():
    dense = build("llama").bfloat16()
    made = upcycle(dense, "mixtral", num_experts=8, top_k=4, granularity=2)
    assert made.receipt.promised == 1e-5
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.bfloat16}
    assert upcycle(dense, "deepseek-v3", num_experts=8, top_k=2).receipt.promised is None
    assert upcycle(dense, "deepseek-v3", num_experts=8, top_k=2, scale=1.0).receipt.promised == 1e-5
    three = upcycle(dense, "mixtral", num_experts=6, top_k=3, granularity=3)
    assert three.receipt.promised is None
    assert three.receipt.largest_logit_difference > 1e-4


# --- the gap is measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", MEASURED)
def test_raw_scores_promise_nothing_and_the_factor_makes_up_for_their_mean(recipe, monkeypatch):
    dense = build("llama")
    made = upcycle(dense, recipe, **numbers(recipe))
    assert made.receipt.promised is None
    assert f"recipe {recipe} with these options does not keep the dense model's function exactly" in made.receipt.notes
    gap_now = made.receipt.largest_logit_difference
    assert 1e-3 < gap_now < 0.6
    monkeypatch.setattr("moesaic.convert.grow.upcycle.neat", lambda _: 1.0)
    assert upcycle(dense, recipe, **numbers(recipe)).receipt.largest_logit_difference > 1.2 * gap_now


def test_a_router_that_says_nothing_keeps_the_function_with_raw_scores_too():
    made = upcycle(build("llama"), "olmoe", num_experts=8, top_k=2, router_std=0.0)
    assert made.receipt.promised == 1e-5
    assert made.receipt.largest_logit_difference < 1e-6
    assert made.receipt.notes[-1] == "routers start at 0: until they have learnt, tokens go to the first experts"
    small = upcycle(build("llama"), "olmoe", num_experts=8, top_k=2, router_std=1e-3).receipt
    assert small.promised is None
    assert small.largest_logit_difference < 0.02


def test_rows_that_a_capacity_drops_break_the_promise():
    dense = plain()
    assert upcycle(dense, "gshard", num_experts=8, top_k=2).receipt.promised is None
    room = {"capacity_factor": 8.0, "eval_capacity_factor": 8.0}
    assert upcycle(dense, "gshard", num_experts=8, top_k=2, **room).receipt.promised == 1e-5


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"method": "drop"}, 0.1, 3.0),
        ({"method": "drop", "drop_ratio": 0.1}, 0.01, 1.0),
        ({"noise": 0.01}, 1e-3, 0.1),
        ({"scale_in": "published", "granularity": 2, "top_k": 4}, 0.01, 0.5),
    ],
)
def test_what_changes_experts_is_measured(options, least, most):
    receipt = upcycle(build("llama"), "mixtral", **{"num_experts": 8, "top_k": 2} | options).receipt
    assert receipt.promised is None
    assert least < receipt.largest_logit_difference < most


def test_dropping_less_leaves_less_of_a_gap_and_experts_differ():
    dense = build("llama")
    gaps = []
    for ratio in (0.0, 0.25, 0.5, 1.0):
        made = upcycle(dense, "mixtral", num_experts=4, top_k=2, method="drop", drop_ratio=ratio)
        gaps.append(made.receipt.largest_logit_difference)
        up_EDF = moe_layers(made.model)["model.layers.0.mlp"].experts.up_EDF
        alike = [torch.equal(one, other) for one, other in itertools.combinations(up_EDF, 2)]
        assert all(alike) if ratio == 0 else not any(alike)
    assert gaps[0] < 1e-6
    assert gaps[1] < gaps[2]


def test_a_wrong_factor_is_refused_and_nothing_is_written(monkeypatch, tmp_path):
    """The promise is checked on the models themselves: a factor off by 1 % does not get through."""
    change = upcycling(open_source(build("llama")), "mixtral", Upcycling(granularity=2), num_experts=8, top_k=4)
    real = parts.scaled
    monkeypatch.setattr(
        "moesaic.convert.grow.upcycle.scaled",
        lambda stack, factor, *rest, **more: real(stack, 1.01 * factor, *rest, **more),
    )
    with pytest.raises(CheckpointError, match="upcycle promises logits within 1e-05 of the source's"):
        convert(open_source(build("llama")), change, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_routers_without_virtual_groups_break_the_function(monkeypatch):
    """With rows drawn apart a token misses shards: the groups are what keeps the function, not the factor."""
    dense = build("llama")
    monkeypatch.setattr("moesaic.convert.grow.upcycle.virtual_groups", lambda router, *_: dict(router))
    with pytest.raises(ConfigError) as error:
        upcycle(dense, "mixtral", num_experts=8, top_k=4, granularity=2)
    assert str(error.value) == (
        "The router of recipe mixtral cannot be made to choose virtual groups of 2 experts whole. Use granularity=1, "
        "or a recipe as mixtral."
    )


# --- routing --------------------------------------------------------------------------------------------------------


def test_every_token_visits_whole_virtual_groups():
    made = upcycle(build("llama"), "mixtral", num_experts=12, top_k=6, granularity=3)
    seen = []
    with observe(made.model, seen.append), torch.no_grad():
        made.model(input_ids=torch.randint(3, 61, (4, 32)))
    for one in seen:
        group_TK = one.routing.expert_N.view(-1, 6).sort(dim=1).values // 3
        assert torch.equal(group_TK[:, 0::3], group_TK[:, 1::3])
        assert torch.equal(group_TK[:, 0::3], group_TK[:, 2::3])
        assert (group_TK[:, 0] != group_TK[:, 3]).all()


def test_virtual_groups_repeat_the_rows_of_experts_and_nothing_else():
    router = {"router.weight": torch.randn(6, 4), "router.bias_E": torch.arange(6.0), "router.other": torch.randn(4)}
    made = virtual_groups(router, 6, 3)
    assert set(made) == {"router.weight", "router.bias_E"}
    assert made["router.bias_E"].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(made["router.weight"][2], router["router.weight"][0])


def test_the_seed_draws_the_router_and_layers_differ():
    dense = build("llama")
    first, again, other = (upcycle(dense, num_experts=4, top_k=2, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    name = "model.layers.{}.mlp.moe.router.weight"
    assert not torch.equal(first[name.format(0)], other[name.format(0)])
    assert not torch.equal(first[name.format(0)], first[name.format(1)])
    wide = upcycle(dense, num_experts=4, top_k=2, router_std=7.0).model.state_dict()[name.format(0)]
    assert float(wide.std()) == pytest.approx(7.0, rel=0.3)


def test_planning_and_making_tensors_draws_no_numbers_and_leaves_the_model_alone(monkeypatch):
    dense, seeds = build("llama"), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)  # what torch.manual_seed calls, GPU or not
    source, before, state = open_source(dense), copy.deepcopy(dense.state_dict()), torch.get_rng_state()
    change = upcycling(source, "deepseek-v3", Upcycling(drop_ratio=0.5, noise=0.1), num_experts=4, top_k=2)
    for step in change.steps:
        step.run({name: source.read(name) for name in step.takes})
    assert torch.equal(torch.get_rng_state(), state)
    assert seeds == []
    upcycle(dense, "deepseek-v3", num_experts=4, top_k=2, method="drop", noise=0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert dense.config.model_type == "llama"


# --- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "jamba", "lstm", "t5"])
def test_every_family_is_upcycled_and_every_tensor_used_once(family):
    dense = build(family)
    recipe = "shazeer-2017" if family == "lstm" else "mixtral"
    made = upcycle(dense, recipe, num_experts=4, top_k=2)
    receipt = made.receipt
    assert receipt.kept + receipt.consumed == receipt.tensors_in
    assert receipt.kept + receipt.made == receipt.tensors_out
    assert receipt.dropped == {}
    assert receipt.largest_logit_difference < 3e-6
    count = len(moe_layers(made.model))
    assert receipt.consumed == count * (2 if family == "lstm" else 3)


@pytest.mark.parametrize(
    "base",
    [
        "mistral",
        "gemma2",
        "phi3",
        "olmo2",
        "granite",
        "smollm3",
        "cohere2",
        "glm4",
        "exaone4",
        "lfm2",
        "arcee",
        "nemotron",
    ],
)
def test_backbones_of_every_make_are_upcycled_whatever_they_call_their_maps(base):
    """glm4 and phi3 join gate and up; lfm2 counts w1, w3, w2; arcee and nemotron have squared ReLU and no gate."""
    model = backbones.dense(base)
    recipe = "shazeer-2017" if base in ("arcee", "nemotron") else "mixtral"
    receipt = upcycle(model, recipe, num_experts=4, top_k=2).receipt
    assert receipt.promised == 1e-5
    assert receipt.largest_logit_difference < 2e-6 * max(1, receipt.largest_logit)
    assert upcycle(model, recipe, num_experts=4, top_k=2, noise=0.1).receipt.largest_logit_difference > 1e-4


def test_some_layers_become_sparse_and_the_others_stay_dense_bit_for_bit():
    dense = build("llama", num_hidden_layers=4)
    for layers, expected in (("every-2", [1, 3]), ([0, 3], [0, 3]), ("all", [0, 1, 2, 3])):
        made = upcycle(dense, num_experts=4, top_k=2, layers=layers)
        assert list(moe_layers(made.model)) == [f"model.layers.{index}.mlp" for index in expected]
        state = made.model.state_dict()
        kept = [name for name in dense.state_dict() if name in state]
        assert all(torch.equal(state[name], dense.state_dict()[name]) for name in kept)
        assert made.receipt.largest_logit_difference < 1e-6


def test_a_folder_becomes_a_folder_that_loads_and_trains(tmp_path):
    dense = build("llama")
    dense.save_pretrained(tmp_path / "dense")
    made = mz.upcycle(tmp_path / "dense", "mixtral", num_experts=4, top_k=2, out=tmp_path / "sparse")
    assert made.model is None
    assert made.receipt.promised == 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert gap(dense, model) < 1e-6
    here = upcycle(dense, "mixtral", num_experts=4, top_k=2).model.state_dict()
    assert all(torch.equal(tensor, here[name]) for name, tensor in model.state_dict().items())
    ids = torch.randint(3, 61, (2, 9))
    output = model.train()(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.aux_loss.item() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_upcycled_model_is_exported_to_the_family_that_others_serve():
    dense = build("llama")
    made = upcycle(dense, "mixtral", num_experts=4, top_k=2)
    native = mz.convert.export(made.model, "mixtral")
    assert native.model.config.model_type == "mixtral"
    assert float((logits(dense, double=False) - logits(native.model, double=False)).abs().max()) < 1e-5


def test_moments_go_where_weights_go_and_what_is_new_has_none():
    source = open_source(build("llama"))
    change = upcycling(source, "deepseek-v3", Upcycling(granularity=2, drop_ratio=0.5), num_experts=8, top_k=4)
    step = change.steps[0]
    moments = {name: torch.rand(source.names[name].shape) + 1 for name in step.takes}
    moved = step.moments(moments)
    assert set(moved) == set(step.gives)
    prefix = "model.layers.0.mlp.moe."
    shapes = {name: tuple(tensor.shape) for name, tensor in step.run({n: source.read(n) for n in step.takes}).items()}
    assert {name: tuple(tensor.shape) for name, tensor in moved.items()} == shapes
    assert not moved[f"{prefix}router.weight"].any()
    up_EDF, up_FD = moved[f"{prefix}experts.up_EDF"], moments["model.layers.0.mlp.up_proj.weight"]
    weight_EDF = step.run({name: source.read(name) for name in step.takes})[f"{prefix}experts.up_EDF"]
    dense_FD = source.read("model.layers.0.mlp.up_proj.weight")
    for e in range(8):
        shard = slice(12 * (e % 2), 12 * (e % 2) + 12)
        is_kept_F = (weight_EDF[e] == dense_FD[shard].T).all(dim=0)
        assert int(is_kept_F.sum()) == 6
        assert torch.equal(up_EDF[e][:, is_kept_F], up_FD[shard].T[:, is_kept_F])
        assert not up_EDF[e][:, ~is_kept_F].any()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "recipe", "options", "message"),
    [
        ("llama", "mixtral", {"top_k": 9, "num_experts": 8}, "top_k must be between 1 and num_experts=8, got 9."),
        ("llama", "switch", {}, "The network at layers.0.mlp has a gate, and the experts of recipe switch have none."),
        (
            "lstm",
            "mixtral",
            {},
            "has no gate, and the experts of recipe mixtral have one. Use a recipe as switch, gshard",
        ),
        ("gpt2", "switch", {}, "The network at h.0.mlp has biases (transformer.h.0.mlp.c_fc.bias, "),
        ("llama", "mixlora", {}, "got recipe mixlora, whose experts are LoRAExperts."),
        ("llama", "moe++", {}, "got recipe moe++, whose experts are MixedExperts."),
        (
            "llama",
            "mixtral",
            {"granularity": 5},
            "granularity must divide the hidden width 24 of the dense network, got 5.",
        ),
        ("llama", "mixtral", {"granularity": 0}, "granularity must be at least 1, got 0."),
        (
            "llama",
            "mixtral",
            {"method": "cut"},
            "method must be 'copy' or 'drop', got 'cut'. 'copy' keeps the function.",
        ),
        ("llama", "mixtral", {"shared": "loud"}, "shared must be 'silent' or 'dense', got 'loud'."),
        ("llama", "mixtral", {"shared": "dense"}, "as wide as the dense network, 24, and recipe mixtral has none."),
        (
            "llama",
            "deepseek-moe",
            {"shared": "dense"},
            "as wide as the dense network, 24, and recipe deepseek-moe has of",
        ),
        ("llama", "mixtral", {"router_std": -1.0}, "router_std must be at least 0, got -1.0."),
        ("llama", "mixtral", {"activation": "gelu"}, "need activation=silu of recipe mixtral, got gelu. Leave it out."),
        ("llama", "mixtral", {"kernel": "auto"}, "kernel is not saved with a model"),
        ("t5", "gpt-oss", {}, "have no option for the dense network's activation gelu_tanh. Use a recipe as mixtral."),
        ("llama", "attention", {"granularity": 2, "num_experts": 8, "top_k": 4}, "virtual groups of 2 experts whole."),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason(family, recipe, options, message):
    with pytest.raises(ConfigError) as error:
        upcycle(build(family), recipe, **options)
    assert message in str(error.value)


def test_a_number_of_choices_that_cuts_groups_apart_is_refused():
    with pytest.raises(ConfigError, match="virtual groups of 4 experts whole"):
        upcycle(build("llama"), "mixtral", num_experts=16, top_k=6, granularity=4)


def test_a_mixture_is_not_upcycled_again():
    made = upcycle(build("llama"), num_experts=4, top_k=2).model
    with pytest.raises(ConfigError, match=r"needs a dense model|mixture already"):
        upcycle(made, num_experts=4, top_k=2)


def test_rooms_know_what_no_method_may_leave_as_it_was_drawn():
    assert room.holds_network("experts.up_EDF")
    assert room.holds_network("shared.down_FD")
    assert room.holds_network("after.ffn.up_DF")
    assert not room.holds_network("shared.token_gate_D")
    assert not room.holds_network("router.weight")
    assert not room.holds_network("after.norm.weight")
