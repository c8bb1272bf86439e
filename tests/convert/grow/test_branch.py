"""Branch-train-mix: networks of several models as experts, everything else averaged, every tensor used once."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic as mz
from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.grow.branch import Mixing, branch_train_mix, mixing
from moesaic.convert.grow.tokens import run_networks
from moesaic.convert.layout.dense import networks
from moesaic.core.errors import ConfigError
from moesaic.data import load_tokenizer
from moesaic.hf import moe_layers, observe
from tests.hf.tiny import build

MLP = "model.layers.0.mlp"


def family(count=3, spread=0.05, **changes):
    """A model, and some that moved away from it."""
    torch.manual_seed(0)
    base = build("llama", **changes)
    branches = [copy.deepcopy(base) for _ in range(count)]
    for branch in branches:
        for parameter in branch.parameters():
            parameter.data += spread * torch.randn_like(parameter)
    return base, branches


def prompts(count=3):
    """Ids that no two branches share."""
    return [torch.randint(3 + 19 * index, 22 + 19 * index, (2, 10)) for index in range(count)]


def test_experts_are_the_branches_networks_bit_for_bit():
    base, branches = family()
    made = branch_train_mix(base, branches, top_k=2)
    for index in (0, 1):
        experts = moe_layers(made.model)[f"model.layers.{index}.mlp"].experts
        for e, branch in enumerate(branches):
            mlp = branch.model.layers[index].mlp
            assert torch.equal(experts.gate_EDF[e], mlp.gate_proj.weight.T)
            assert torch.equal(experts.up_EDF[e], mlp.up_proj.weight.T)
            assert torch.equal(experts.down_EFD[e], mlp.down_proj.weight.T)


@pytest.mark.parametrize("weights", [None, [1, 0, 0], [1.0, 2.0, 5.0]])
def test_everything_else_is_the_weighted_mean_of_the_branches(weights):
    base, branches = family()
    made = branch_train_mix(base, branches, top_k=2, weights=weights).model.state_dict()
    part = torch.tensor(weights or [1, 1, 1], dtype=torch.float64)
    for name in base.state_dict():
        if "mlp" not in name:
            parts = torch.stack([branch.state_dict()[name].double() for branch in branches], dim=-1)
            torch.testing.assert_close(made[name].double(), parts @ (part / part.sum()), rtol=1e-6, atol=1e-7)


def test_or_it_is_the_bases():
    base, branches = family()
    made = branch_train_mix(base, branches, top_k=2, rest="base")
    state = made.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.state_dict().items() if "mlp" not in name)
    assert set(made.receipt.dropped.values()) == {
        "the branches' networks are the experts",
        "the base's takes its place",
    }


@pytest.mark.parametrize("rest", ["average", "base"])
def test_every_tensor_of_every_model_is_used_once(rest):
    base, branches = family()
    receipt = branch_train_mix(base, branches, top_k=2, rest=rest).receipt
    assert receipt.tensors_in == 4 * 21
    assert receipt.kept + receipt.consumed == receipt.tensors_in
    assert receipt.kept + receipt.made == receipt.tensors_out == 23
    networks_dropped = {name for name in receipt.dropped if "mlp" in name and ":" not in name}
    assert len(networks_dropped) == 6
    assert len(receipt.dropped) == (21 if rest == "average" else 6 + 3 * 15)


def test_layers_that_stay_dense_are_averaged_too():
    base, branches = family()
    made = branch_train_mix(base, branches, top_k=2, layers=[1])
    name = f"{MLP}.up_proj.weight"
    mean = torch.stack([branch.state_dict()[name] for branch in branches]).mean(dim=0)
    torch.testing.assert_close(made.model.state_dict()[name], mean)
    assert list(moe_layers(made.model)) == ["model.layers.1.mlp"]


@pytest.mark.parametrize("recipe", ["mixtral", "deepseek-v3", "llama-moe", "skywork"])
def test_branches_that_never_moved_are_the_base_again(recipe):
    base, _ = family()
    made = branch_train_mix(base, [base, base, base], recipe=recipe, top_k=2)
    assert made.receipt.largest_logit_difference < 3e-6
    assert made.receipt.promised is None


def test_gates_point_to_what_the_base_reads_on_each_experts_prompts():
    base, branches = family()
    text = prompts()
    made = branch_train_mix(base, branches, top_k=2, prompts=text, gate_scale=2.0)
    for network in networks(base):
        for e, ids in enumerate(text):
            read = run_networks(base, [network], [{"input_ids": ids}])[network.path].mean(dim=0)
            row = moe_layers(made.model)[f"model.{network.path}"].router.weight[e]
            torch.testing.assert_close(row, 2 * read / read.norm(), rtol=1e-5, atol=1e-6)
    assert made.receipt.notes[-1].startswith(
        "gates point to the experts' prompts; the two that are most alike have cos"
    )


def test_tokens_of_an_experts_prompts_go_to_it_with_negative_prompts_too():
    base, branches = family(2)
    text = prompts(2)

    def share(model, ids):
        seen = []
        with observe(model, seen.append), torch.no_grad():
            model(input_ids=ids)
        return [float((one.routing.expert_N.view(-1, 2)[:, 0] == 0).double().mean()) for one in seen]

    for negative in (None, text[::-1]):
        made = branch_train_mix(base, branches, top_k=2, prompts=text, negative_prompts=negative).model
        assert min(share(made, text[0])) > 0.8
        assert max(share(made, text[1])) < 0.2
    # Turned away from each other's prompts, the two are opposite.
    row_ED = moe_layers(made)[MLP].router.weight
    assert torch.nn.functional.cosine_similarity(row_ED[0], row_ED[1], dim=0).item() == pytest.approx(-1, abs=1e-5)


def test_prompts_that_cannot_be_told_apart_are_told():
    base, branches = family(2)
    same = prompts(1) * 2
    made = branch_train_mix(base, branches, top_k=2, prompts=same)
    assert made.receipt.notes[-1].endswith(
        "have cosine 1.000: such experts are hard to tell apart, give prompts that differ more"
    )


def test_folders_become_a_folder_and_texts_are_read_with_the_bases_tokenizer(tmp_path):
    base, branches = family(2, vocab_size=300)
    tokenizer = load_tokenizer("bytes")
    for name, model in zip(("base", "one", "two"), (base, *branches), strict=True):
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "base")
    texts = [["a king", "a queen"], ["1 + 1"]]
    folders = [tmp_path / "one", tmp_path / "two"]
    out = tmp_path / "mixed"
    mz.convert.branch_train_mix(tmp_path / "base", folders, top_k=2, prompts=texts, out=out)
    here = branch_train_mix(base, branches, top_k=2, prompts=texts, tokenizer=tokenizer).model.state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, here[name]) for name, tensor in loaded.items())
    assert (out / "tokenizer.json").is_file()


def test_half_precision_is_averaged_in_float32_and_kept():
    base, branches = family()
    made = branch_train_mix(base.bfloat16(), [branch.bfloat16() for branch in branches], top_k=2).model
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    name = "model.embed_tokens.weight"
    mean = torch.stack([branch.state_dict()[name].float() for branch in branches]).mean(dim=0)
    torch.testing.assert_close(made.state_dict()[name], mean.bfloat16())


def test_moments_are_stacked_and_averaged_like_weights():
    base, branches = family()
    sources = [open_source(one) for one in (base, *branches)]
    change = mixing(sources, "mixtral", Mixing(weights=(0.5, 0.25, 0.25)), top_k=2)
    for step in change.steps:
        taken = {name: torch.rand(2, 2) for name in step.takes}
        if step.gives == ("model.norm.weight",):
            moved = step.moments(taken)["model.norm.weight"]
            torch.testing.assert_close(
                moved, sum(w * taken[f"{i}:model.norm.weight"] for i, w in ((1, 0.5), (2, 0.25), (3, 0.25)))
            )
        if not step.gives:
            assert step.moments(taken) == {}
            assert step.why


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"branches": []}, "Branch-train-mix needs at least two branches, got none."),
        ({"weights": [1.0]}, "weights must be 3 numbers of at least 0, not all 0, one for each branch, got [1.0]."),
        ({"weights": [1.0, -2.0, 3.0]}, "got [1.0, -2.0, 3.0]."),
        ({"weights": [0, 0, 0]}, "not all 0"),
        ({"rest": "first"}, "rest must be 'average' or 'base', got 'first'."),
        ({"gate": "hidden"}, "gate='hidden' points to what prompts give, got none."),
        ({"gate": "embed"}, "gate must be 'hidden' or 'random', got 'embed'."),
        ({"prompts": prompts(2)}, "prompts must have one entry for each of the 3 branches, got 2."),
        ({"prompts": prompts(), "negative_prompts": [None]}, "negative_prompts must have one entry for each of the 3"),
        ({"prompts": prompts(), "gate_scale": 0.0}, "gate_scale must be above 0, got 0.0."),
        ({"prompts": [["a"], ["b"], ["c"]]}, "Texts need a tokenizer"),
        ({"top_k": 4}, "top_k must be between 1 and num_experts=3, got 4."),
    ],
)
def test_what_cannot_be_mixed_is_refused_with_its_reason(given, message):
    base, branches = family()
    with pytest.raises(ConfigError) as error:
        branch_train_mix(base, **{"branches": branches, "top_k": 2} | given)
    assert message in str(error.value)


def test_models_of_another_shape_are_refused_naming_the_first_tensor():
    base, branches = family()
    with pytest.raises(ConfigError) as error:
        branch_train_mix(base, [*branches[:2], build("llama", intermediate_size=48)], top_k=2)
    assert str(error.value) == (
        "Branches must have the base's tensors, but model.layers.0.mlp.down_proj.weight is (16, 24) in "
        "LlamaForCausalLM and (16, 48) in LlamaForCausalLM. Mix models that were trained from one."
    )
    with pytest.raises(ConfigError, match=r"self_attn\.k_norm\.weight is nothing in LlamaForCausalLM"):
        branch_train_mix(base, [build("qwen3", tie_word_embeddings=False), base], top_k=2)
