"""Splitting: slices of all neurons are the network, and what fewer of them miss is told."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic as mz
from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.grow import cut
from moesaic.convert.grow.cut import Splitting
from moesaic.convert.grow.split import Reading, split, splitting
from moesaic.convert.grow.target import target
from moesaic.convert.layout.dense import run_dense
from moesaic.convert.run import convert
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.hf import moe_layers, observe
from moesaic.kernels.activations import silu
from tests.hf.tiny import build

F = 48
METHODS = ("random", "cluster", "coactivation", "importance")
GATES = ("zero", "random", "centers", "from-data", "moefication")
# E + shared experts of each recipe divide the neurons.
EXPERTS = {"deepseek-v3": 5, "qwen1.5-moe": 4, "deepseek-moe": 4, "arctic": 4}


def dense(**changes):
    torch.manual_seed(0)
    return build("llama", **{"intermediate_size": F} | changes)


def ids(sequences=8, positions=32):
    return torch.randint(3, 61, (sequences, positions), generator=torch.Generator().manual_seed(1))


def layer(made, index=0):
    return moe_layers(made.model)[f"model.layers.{index}.mlp"]


def neurons_of(made, model, index=0):
    """Which neuron of the dense network each neuron of each expert is, told by its up projection."""
    up_FD = model.state_dict()[f"model.layers.{index}.mlp.up_proj.weight"]
    stacks = layer(made, index)
    found = [(up_FD[None] == expert.T[:, None]).all(dim=2).nonzero()[:, 1] for expert in stacks.experts.up_EDF]
    if getattr(stacks, "shared", None) is not None:
        found.append((up_FD[None] == stacks.shared.up_DF.T[:, None]).all(dim=2).nonzero()[:, 1])
    return found


# --- the function is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    ["mixtral", "olmoe", "llama-moe", "gpt-oss", "skywork", "deepseek-v3", "qwen1.5-moe", "deepseek-moe", "arctic"],
)
def test_all_slices_with_weight_one_are_the_dense_network(recipe):
    count = EXPERTS.get(recipe, 4)
    made = split(dense(), recipe, num_experts=count, top_k=count, gate="zero")
    assert made.receipt.promised is not None
    assert made.receipt.largest_logit_difference < 2e-6


@pytest.mark.parametrize("method", METHODS)
def test_they_are_whichever_way_neurons_were_cut(method):
    made = split(dense(), num_experts=6, top_k=6, method=method, gate="zero", scale="slices", text=ids())
    assert made.receipt.promised == pytest.approx(1e-4)  # times 6: no power of two
    assert made.receipt.largest_logit_difference < 2e-6


def test_plain_networks_are_split_too():
    made = split(build("t5", feed_forward_proj="relu"), "shazeer-2017", num_experts=4, top_k=4, gate="zero")
    assert made.receipt.promised == 1e-5
    assert made.receipt.largest_logit_difference < 2e-6


def test_biased_networks_share_the_last_bias_out():
    model = dense(mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    made = split(model, "gpt-oss", num_experts=4, top_k=4, gate="zero")
    assert made.receipt.promised == pytest.approx(1e-4)
    assert made.receipt.largest_logit_difference < 3e-6


def test_any_other_factor_gate_or_number_of_choices_promises_nothing_and_shows():
    kept = {"num_experts": 4, "top_k": 4, "gate": "zero"}
    for change in ({"scale": "published"}, {"scale": 4.04}, {"gate": "centers", "spread": 1.0}, {"top_k": 3}):
        receipt = split(dense(), **kept | change).receipt
        assert receipt.promised is None, change
        assert receipt.largest_logit_difference > 1e-3, change


def test_a_wrong_factor_is_refused_and_nothing_is_written(monkeypatch, tmp_path):
    source = open_source(dense())
    how = Splitting(gate="zero", scale="slices")
    change = splitting(source, "mixtral", how, Reading(), num_experts=4, top_k=4)
    real = cut.scaled
    monkeypatch.setattr(cut, "scaled", lambda stack, factor: real(stack, 1.001 * factor))
    with pytest.raises(CheckpointError, match="split promises logits within 1e-05"):
        convert(source, change, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- neurons --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["mixtral", "deepseek-v3", "qwen1.5-moe"])
@pytest.mark.parametrize("method", METHODS)
def test_every_neuron_is_in_one_expert_with_its_row_and_column(method, recipe):
    model = dense()
    made = split(model, recipe, num_experts=EXPERTS.get(recipe, 4), top_k=2, method=method, text=ids())
    found = neurons_of(made, model)
    assert sorted(torch.cat(found).tolist()) == list(range(F))
    assert len({len(neurons) for neurons in found[: layer(made).num_experts]}) == 1
    state, experts = model.state_dict(), layer(made).experts
    factor = (experts.down_EFD[0, 0] / state["model.layers.0.mlp.down_proj.weight"][:, found[0][0]])[0].item()
    for e, neurons in enumerate(found[: layer(made).num_experts]):
        assert torch.equal(experts.gate_EDF[e], state["model.layers.0.mlp.gate_proj.weight"][neurons].T)
        down_FD = state["model.layers.0.mlp.down_proj.weight"].T[neurons]
        torch.testing.assert_close(experts.down_EFD[e], factor * down_FD)


def test_parameters_stay_as_many_but_for_the_routers():
    model = dense()
    made = split(model, num_experts=4, top_k=2)
    routers = sum(one.router.weight.numel() for one in moe_layers(made.model).values())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in made.model.parameters()) == count + routers
    assert made.receipt.kept + made.receipt.consumed == made.receipt.tensors_in
    assert made.receipt.dropped == {}


def test_the_shared_expert_has_the_neurons_that_matter_most_by_text_or_by_weights():
    model = dense()
    for name in ("gate_proj", "up_proj"):
        model.state_dict()[f"model.layers.0.mlp.{name}.weight"][[3, 30]] *= 4
    for given in ({}, {"text": ids()}):
        made = split(model, "deepseek-v3", num_experts=5, top_k=2, **given)
        assert {3, 30} <= set(neurons_of(made, model)[-1].tolist())
        assert "the 8 neurons of each network that matter most are the shared expert" in made.receipt.notes


def test_experts_that_overlap_share_neurons_and_the_receipt_tells_who_is_left_out():
    model = dense()
    made = split(model, num_experts=4, top_k=2, method="importance", overlap=True, hidden=20, text=ids())
    found = neurons_of(made, model)
    assert [len(neurons) for neurons in found] == [20] * 4
    used = [len({*torch.cat(neurons_of(made, model, index)).tolist()}) for index in (0, 1)]
    assert f"{1 - sum(used) / (2 * F):.1%} of the neurons are in no expert" in made.receipt.notes


def test_the_seed_draws_partitions_and_layers_differ():
    model = dense()
    first, again, other = (split(model, num_experts=4, top_k=2, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(t, again.model.state_dict()[name]) for name, t in first.model.state_dict().items())
    assert [n.tolist() for n in neurons_of(first, model)] != [n.tolist() for n in neurons_of(other, model)]
    assert [n.tolist() for n in neurons_of(first, model)] != [n.tolist() for n in neurons_of(first, model, 1)]


# --- gates and factors ----------------------------------------------------------------------------------------------


def there(receipt):
    """What part of the networks' output the receipt says is there, on tokens held back."""
    return float(re.search(r"on held-out tokens (\S+)% of the dense", receipt.notes[-1])[1])


def test_gates_that_know_the_text_give_more_of_the_output_than_one_that_does_not():
    model, text = dense(), ids(32)
    given = {"num_experts": 8, "top_k": 4, "method": "importance", "text": text}
    share = {gate: there(split(model, gate=gate, **given).receipt) for gate in GATES}
    assert share["from-data"] > share["random"] + 5
    assert share["moefication"] > share["random"] + 5
    assert share["centers"] > share["random"]


def test_neurons_cut_by_what_they_do_give_more_of_the_output_than_neurons_cut_by_chance():
    model, text = dense(), ids(32)
    given = {"num_experts": 8, "top_k": 4, "gate": "from-data", "text": text}
    share = {method: there(split(model, method=method, **given).receipt) for method in METHODS}
    assert share["importance"] > share["random"]
    assert share["coactivation"] > share["random"]


def test_more_choices_give_more_of_the_output_and_all_of_them_all():
    share = [there(split(dense(), num_experts=4, top_k=k, text=ids()).receipt) for k in (2, 3, 4)]
    assert share[0] < share[1] < share[2]
    assert share[2] > 99.5


def test_the_fitted_factor_is_the_best_that_there_is():
    model, text = dense(), ids(32)
    given = {"num_experts": 8, "top_k": 4, "gate": "from-data", "text": text, "layers": [0]}
    best = there(split(model, scale="fit", **given).receipt)
    # It was fitted to other tokens than it is judged on: hence the little room.
    assert all(best > there(split(model, scale=scale, **given).receipt) - 0.3 for scale in (2.0, 3.0, 4.0, 5.0, 8.0))
    assert best > there(split(model, scale=2.0, **given).receipt) + 3


@pytest.mark.parametrize(("scale", "total"), [("slices", 2.0), ("published", 4.0), (3.0, 3.0), (None, 2.0)])
@pytest.mark.parametrize(("recipe", "weights"), [("mixtral", 1.0), ("llama-moe", 4.0)])
def test_factors_are_what_the_weights_of_a_token_add_up_to(recipe, weights, scale, total):
    """LLaMA-MoE's own E / K is already in its router's weights."""
    model = dense()
    made = split(model, recipe, num_experts=8, top_k=2, scale=scale, gate="random")
    down_FD = model.state_dict()["model.layers.0.mlp.down_proj.weight"].T[neurons_of(made, model)[0]]
    torch.testing.assert_close(layer(made).experts.down_EFD[0], total / weights * down_FD)


@pytest.mark.parametrize("recipe", ["mixtral", "llama-moe", "skywork", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("gate", ["from-data", "moefication", "centers"])
def test_fitted_gates_fit_every_router_that_is_linear_or_has_a_hidden_layer(recipe, gate):
    made = split(dense(), recipe, num_experts=EXPERTS.get(recipe, 4), top_k=2, gate=gate, text=ids(), spread=0.05)
    seen = []
    with observe(made.model, seen.append), torch.no_grad():
        made.model(input_ids=ids())
    for one in seen:
        assert one.routing.load_E.sum() == 2 * one.routing.num_tokens
        assert one.routing.logits_TE.std(dim=1).mean() == pytest.approx(0.05, rel=0.5)


def test_routers_of_another_form_take_no_fitted_gate_but_their_own():
    with pytest.raises(ConfigError, match="A fitted gate needs a router whose logits are one linear map"):
        split(dense(), "attention", num_experts=4, top_k=2)
    assert split(dense(), "attention", num_experts=4, top_k=2, gate="random").receipt.promised is None


def test_tokens_that_the_network_answers_loudly_count_no_more_than_others():
    """In real models a first token's output may be a thousand times as long: squares would see nothing else."""
    model = dense()
    (room, _) = target(
        open_source(model), "mixtral", layers="all", hidden=lambda _: F // 4, num_experts=4, top_k=2, seed=0
    ).rooms
    ffn, how = room.network.read(model.state_dict()), Splitting(gate="from-data", scale="fit")
    x_TD = torch.randn(400, 16)
    loud_TD = x_TD.clone()
    loud_TD[::100] *= 100
    plain, loud = (cut.cut_network(room, how, ffn, one) for one in (x_TD, loud_TD))
    assert loud.factor == pytest.approx(plain.factor, rel=0.1)
    assert loud.missing == pytest.approx(plain.missing, rel=0.2)
    wanted_TD = run_dense(ffn, loud_TD, silu)
    assert wanted_TD.norm(dim=1).max() > 1000 * wanted_TD.norm(dim=1).median()


# --- moments, folders, refusals -------------------------------------------------------------------------------------


def test_moments_go_where_their_neurons_go():
    source = open_source(dense())
    change = splitting(source, "deepseek-v3", Splitting(), Reading(), num_experts=5, top_k=2)
    step = change.steps[0]
    weights = step.run({name: source.read(name) for name in step.takes})
    moments = {name: source.read(name).square() for name in step.takes}
    moved = step.moments(moments)
    assert {name: t.shape for name, t in moved.items()} == {name: t.shape for name, t in weights.items()}
    prefix = "model.layers.0.mlp.moe."
    for name in ("experts.up_EDF", "experts.gate_EDF", "shared.up_DF", "shared.down_FD"):
        torch.testing.assert_close(moved[prefix + name], weights[prefix + name].square())
    assert not moved[f"{prefix}router.weight"].any()


def test_a_folder_becomes_a_folder_that_loads_and_trains(tmp_path):
    dense().save_pretrained(tmp_path / "dense")
    made = mz.split(tmp_path / "dense", num_experts=4, top_k=2, text=ids(), out=tmp_path / "sparse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    here = split(dense(), num_experts=4, top_k=2, text=ids()).model.state_dict()
    assert all(torch.equal(tensor, here[name]) for name, tensor in model.state_dict().items())
    assert made.model is None
    batch = ids(2, 9)
    model.train()(input_ids=batch, labels=batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_half_precision_weights_stay_half_precision():
    made = split(dense().bfloat16(), num_experts=4, top_k=4, gate="zero")
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.bfloat16}
    assert made.receipt.promised == 1e-5
    assert split(dense().bfloat16(), num_experts=4, top_k=2, text=ids()).receipt.promised is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_experts": 7},
            "The 48 neurons of layers.0.mlp cannot be cut into 7 equal experts. Use num_experts=4 or 6 or 8.",
        ),
        (
            {"recipe": "deepseek-v3", "num_experts": 8},
            "cannot be cut into 8 equal experts beside 1 shared ones. Use num_experts=5 or 7 or 11.",
        ),
        ({"method": "importance"}, "method='importance' needs text to see which neurons are active when, got none."),
        ({"gate": "from-data"}, "gate='from-data' needs text"),
        ({"scale": "fit"}, "scale='fit' needs text"),
        ({"method": "metis"}, "method must be one of random, cluster, coactivation, importance, got 'metis'."),
        ({"gate": "open"}, "gate must be one of zero, random, centers, from-data, moefication, got 'open'."),
        ({"scale": "half"}, "scale must be 'fit', 'slices', 'published' or a number, got 'half'."),
        ({"scale": -2.0}, "scale must be above 0, got -2.0. K lets each chosen slice count once."),
        ({"spread": 0.0}, "spread must be above 0, got 0.0. Use gate='zero' for equal logits."),
        ({"overlap": True}, "overlap is for method='importance', got 'random'. Leave it out."),
        ({"hidden": 12, "method": "importance", "text": ids()}, "hidden is for experts that may overlap"),
        ({"method": "importance", "text": ids(1, 2)}, "2 tokens cannot be cut into 4 groups. Give more text."),
    ],
)
def test_what_cannot_be_split_is_refused_with_its_reason(options, message):
    with pytest.raises(ConfigError) as error:
        split(dense(), **{"num_experts": 4, "top_k": 2} | options)
    assert message in str(error.value)
