from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic import recipes
from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.layout.counts import shrinkable
from moesaic.convert.proof.receipt import Receipt
from moesaic.convert.run import convert
from moesaic.convert.shrink.calibration import calibrate
from moesaic.convert.shrink.prune import keep_best, prune_experts, pruned
from moesaic.core.errors import ConfigError
from moesaic.hf import sparsify
from tests.convert.plain import VOCABULARY, E, block_of, experts_path, native
from tests.hf.tiny import OPTIONS, build

NATIVE = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3")


def text(count: int = 2) -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, (2, 6)) for _ in range(count)]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def ours(recipe: str = "mixtral", **options: Any) -> Any:
    return sparsify(build("llama"), recipe, num_experts=4, top_k=2, init_std=0.3, **options).eval()


# --- choosing -------------------------------------------------------------------------------------------------------


def test_the_best_are_kept_in_their_order_and_ties_go_to_the_lowest():
    assert keep_best(torch.tensor([1.0, 5.0, 1.0, 3.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert keep_best(torch.zeros(4), 2).tolist() == [0, 1]


def test_each_group_keeps_as_many():
    score = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    assert keep_best(score, 4).tolist() == [0, 1, 2, 3]
    assert keep_best(score, 4, groups=2).tolist() == [0, 1, 6, 7]
    assert keep_best(score, 4, groups=4).tolist() == [0, 2, 5, 7]


def test_protected_experts_stay():
    assert keep_best(torch.tensor([3.0, 2.0, 0.0]), 2, protect=[2]).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.ones(4), 5),
            "Experts to keep must be between 1 and 4, the number that a layer has, got 5. Give fewer than there are.",
        ),
        (
            (torch.ones(4), 3, 2),
            "A router that chooses among 2 groups needs as many experts in each, got 3 to keep. Give a multiple of 2.",
        ),
        (
            (torch.ones(6), 2, 2, [0, 1]),
            "2 experts of one group are protected, and 1 are to be kept. Keep more, or protect fewer.",
        ),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(arguments, message):
    score, keep, groups, protect = (*arguments, *(1, [])[len(arguments) - 2 :])
    with pytest.raises(ConfigError) as error:
        keep_best(score, keep, groups=groups, protect=protect)
    assert str(error.value) == message


# --- native families ------------------------------------------------------------------------------------------------


def masked(family: str, model: Any, kept: dict[int, list[int]]) -> Any:
    """The same model in which no router can choose an expert that is gone."""
    model = copy.deepcopy(model)
    for layer, experts in kept.items():
        block = block_of(family, model, layer)
        router = block.router if family == "gpt_oss" else block.gate
        gone = [e for e in range(E) if e not in experts]

        def forward(x: Tensor, router: Any = router, gone: list[int] = gone) -> Any:
            x = x.reshape(-1, x.shape[-1])
            logits_TE = x @ router.weight.T + getattr(router, "bias", 0)
            logits_TE = logits_TE.index_fill(1, torch.tensor(gone, dtype=torch.int64), -torch.inf)
            if family == "gpt_oss":
                top = logits_TE.topk(3)
                return logits_TE, top.values.softmax(dim=-1), top.indices
            if family == "deepseek_v3":
                scores_TE = logits_TE.float().sigmoid()
                biased_TE = scores_TE + router.e_score_correction_bias
                biased_TE[:, gone] = -torch.inf
                group_TG = biased_TE.view(len(x), 4, 2).amax(dim=-1)
                best = group_TG.topk(3).indices
                allowed = torch.full_like(group_TG, -torch.inf).scatter(1, best, 0)
                index = (biased_TE + allowed.repeat_interleave(2, dim=1)).topk(3).indices
                weight = scores_TE.gather(1, index)
                return logits_TE, 2.5 * weight / weight.sum(dim=-1, keepdim=True), index
            scores_TE = logits_TE.float().softmax(dim=-1)
            top = scores_TE.topk(3)
            weight = top.values if family == "qwen2_moe" else top.values / top.values.sum(dim=-1, keepdim=True)
            return logits_TE, weight.to(x.dtype), top.indices

        router.forward = forward
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_pruned_model_is_the_old_one_whose_routers_cannot_choose_what_is_gone(family):
    model = native(family)
    stats = calibrate(model, text())
    converted = prune_experts(model, 5, stats=stats)
    kept = {layer: keep_best(stats[experts_path(layer)].saliency("reap"), 5).tolist() for layer in (0, 1)}
    ids = text(1)[0]
    assert torch.allclose(logits(converted.model, ids), logits(masked(family, model, kept), ids), atol=1e-9)
    assert not torch.allclose(logits(converted.model, ids), logits(model, ids), atol=1e-3)
    gone = ", ".join(str(e) for e in range(E) if e not in kept[0])
    assert converted.receipt.notes[0] == f"{experts_path(0)}: kept 5 of 8 experts; pruned {gone}"
    assert converted.receipt.method == "prune_experts by reap"


def test_a_family_with_groups_keeps_as_many_of_each_and_its_bias_goes_along():
    model = native("deepseek_v3", n_group=2, topk_group=1, num_experts_per_tok=2)
    stats = calibrate(model, text())
    converted = prune_experts(model, 6, stats=stats)
    index = keep_best(stats[experts_path(0)].saliency("reap"), 6, groups=2)
    assert [int((index < 4).sum()), int((index >= 4).sum())] == [3, 3]
    new, old = (block_of("deepseek_v3", one, 0) for one in (converted.model, model))
    assert torch.equal(new.gate.e_score_correction_bias, old.gate.e_score_correction_bias[index])
    assert torch.equal(new.gate.weight, old.gate.weight[index])
    assert torch.equal(new.experts.gate_up_proj, old.experts.gate_up_proj[index])
    assert (converted.model.config.n_routed_experts, converted.model.config.n_group) == (6, 2)


def made_unpopular(family: str, model: Any, experts: list[int]) -> None:
    """Let routers never choose some experts, whatever they read."""
    with torch.no_grad():
        for layer in (0, 1):
            block = block_of(family, model, layer)
            if family == "gpt_oss":
                block.router.bias[experts] = -1e4
            elif family == "deepseek_v3":
                block.gate.e_score_correction_bias[experts] = -30.0
            else:
                # Tokens have a part that is the same for all: the embedding and what stands beside it.
                model.model.embed_tokens.weight[:, 0] = 9.0
                block.gate.weight[experts, 0] = -200.0
                block.gate.weight[[e for e in range(E) if e not in experts], 0] = 0.0


@pytest.mark.parametrize("family", NATIVE)
def test_experts_that_no_token_used_go_without_a_trace(family):
    unpopular = [2, 7]
    # Where weights are shares of all experts, those that go take theirs with them.
    changes = {"deepseek_v3": {"n_group": 2, "topk_group": 1}, "qwen2_moe": {"norm_topk_prob": True}}
    model = native(family, **changes.get(family, {}))
    made_unpopular(family, model, unpopular)
    ids = text()
    stats = calibrate(model, ids)
    assert all(one.count_E[unpopular].tolist() == [0, 0] for one in stats.values())
    converted = prune_experts(model, 6, stats=stats, by="frequency")
    gap = max(float((logits(converted.model, one) - logits(model, one)).abs().max()) for one in ids)
    assert gap < 1e-5
    assert logits(model, ids[0]).abs().max() > 0.1


@pytest.mark.parametrize("family", NATIVE)
def test_a_pruned_folder_loads_in_transformers_and_says_what_it_is(family, tmp_path):
    model = native(family, **({"n_group": 2} if family == "deepseek_v3" else {})).float()
    model.save_pretrained(tmp_path / "old")
    converted = prune_experts(tmp_path / "old", 0.5, batches=text(), by="ean", out=tmp_path / "new")
    assert converted.folder == tmp_path / "new"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    in_memory = prune_experts(model, 4, stats=calibrate(model, text()), by="ean").model
    assert block_of(family, loaded, 0).experts.down_proj.shape == block_of(family, in_memory, 0).experts.down_proj.shape
    assert block_of(family, loaded, 1).experts.num_experts == 4
    receipt = Receipt.load(tmp_path / "new")
    assert receipt.largest_logit_difference > 0
    assert receipt.tensors_in == receipt.tensors_out


# --- our models -----------------------------------------------------------------------------------------------------


def test_our_models_may_keep_another_number_in_each_layer(tmp_path):
    model = ours()
    converted = prune_experts(model, [3, 2], batches=text(), out=tmp_path / "new")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert [block.mlp.moe.num_experts for block in loaded.model.layers] == [3, 2]
    ids = text(1)[0]
    assert torch.equal(logits(loaded, ids), logits(converted.model, ids))
    assert model.model.layers[0].mlp.moe.num_experts == 4


def test_groups_that_follow_from_the_number_of_experts_stay_what_they_were():
    model = sparsify(build("llama"), "deepseek-v3", num_experts=64, top_k=2, hidden=4).eval()
    assert model.model.layers[0].mlp.moe.router.groups.num_groups == 2
    converted = prune_experts(model, 0.5, batches=text())
    router = converted.model.model.layers[0].mlp.moe.router
    assert (router.num_experts, router.groups.num_groups, router.groups.groups_kept) == (32, 2, 1)
    assert router.bias_E.shape == (32,)


def test_a_bias_that_was_added_for_balance_goes_along():
    model = sparsify(build("llama"), "mixtral", num_experts=4, balance={"bias": 1e-3}).eval()
    for block in model.model.layers:
        block.mlp.moe.router.bias_E += torch.tensor([0.0, 0.1, 0.2, 0.3])
    converted = prune_experts(model, 2, batches=text(), protect={"model.layers.0.mlp.moe.experts": [1, 3]})
    bias_E = converted.model.model.layers[0].mlp.moe.router.bias_E
    assert torch.equal(bias_E, torch.tensor([0.1, 0.3]))


def test_moments_go_where_their_weights_go():
    model = ours()
    source = open_source(model)
    kept = {f"model.layers.{layer}.mlp.moe.experts": torch.tensor([1, 3]) for layer in (0, 1)}
    change = pruned(source, kept)
    for step in change.steps:
        tensors = {name: torch.randn(source.names[name].shape) for name in step.takes}
        moved = step.moments(tensors)
        assert set(moved) == set(step.gives)
        for name, tensor in moved.items():
            assert torch.equal(tensor, tensors[name][[1, 3]])


def test_super_experts_are_kept_whatever_their_rank():
    model = native("mixtral")
    stats = calibrate(model, text())
    worst = int(stats[experts_path(0)].saliency("reap").argmin())
    stats[experts_path(0)].largest_E[worst] = 1e4
    index = prune_experts(model, 4, stats=stats, protect="super-experts").receipt.notes[0]
    assert str(worst) not in index.split("pruned ")[1].split(", ")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build_model", "arguments", "message"),
    [
        (
            lambda: native("mixtral"),
            {"keep": 2, "batches": []},
            "Each token visits 3 experts, and model.layers.0.mlp.exp",
        ),
        (
            lambda: native("deepseek_v3"),
            {"keep": 4, "batches": []},
            "would leave it 2 to choose from, in 2 of 4 groups",
        ),
        (lambda: native("deepseek_v3"), {"keep": 6, "batches": []}, "Give a multiple of 4"),
        (
            lambda: native("deepseek_v3", num_experts_per_tok=2),
            {"keep": 4, "batches": text()},
            "each group must hold at least best_per_group=2 experts, got 1",
        ),
        (lambda: native("mixtral"), {"keep": 4}, "prune_experts needs text to see what experts do, or statistics"),
        (lambda: native("mixtral"), {"keep": 0.0, "batches": []}, "must be above 0 and at most 1, got 0.0"),
        (lambda: native("mixtral"), {"keep": [4], "batches": []}, "for each layer needs 2 numbers, got 1"),
        (lambda: build("llama"), {"keep": 4, "batches": []}, "LlamaForCausalLM has no MoE layers whose experts"),
        (
            lambda: native("mixtral"),
            {"keep": 4, "stats": {}},
            "statistics of 8 experts at model.layers.0.mlp.experts, got",
        ),
        (
            lambda: native("mixtral"),
            {"keep": 4, "batches": text(), "protect": "all"},
            "protect must be 'super-experts', or indices",
        ),
        (
            lambda: native("mixtral"),
            {"keep": 4, "batches": text(), "protect": {"layers.0": [1]}},
            "such as model.layers.0.mlp.experts, got layers.0",
        ),
        (
            lambda: native("mixtral"),
            {"keep": [4, 5], "batches": text()},
            "A model of type mixtral has one number of experts for all layers, got 4, 5",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(build_model, arguments, message):
    with pytest.raises(ConfigError) as error:
        prune_experts(build_model(), **arguments)
    assert message in str(error.value)


# Recipes in which an expert is more than a row of the router and weights of its own.
WHOLE = {
    *("attention", "base", "cosine", "hash", "hierarchical-2017", "llama-moe", "lora-moe", "lory", "mixlora", "mod"),
    *("moe++", "mole", "pangu-sigma", "smear", "soft-moe", "thor"),
}


@pytest.mark.filterwarnings("ignore:In recipe .* a token's experts depend on later tokens:UserWarning")
@pytest.mark.parametrize("recipe", sorted(set(recipes.names()) - WHOLE))
def test_renaming_experts_changes_nothing_in_any_recipe(recipe):
    model = sparsify(build("llama"), recipe, **OPTIONS[recipe]).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # fresh routers may be zeros, before whom all experts are equal
            torch.nn.init.normal_(parameter, std=0.2)
    source = open_source(model)
    order = {}
    for path, layout in shrinkable(source.blueprint).items():
        each = layout.num_experts // layout.groups
        order[path] = torch.cat([torch.randperm(each) + group * each for group in range(layout.groups)])
    assert convert(source, pruned(source, order)).receipt.largest_logit_difference < 1e-5


@pytest.mark.filterwarnings("ignore:In recipe .* a token's experts depend on later tokens:UserWarning")
@pytest.mark.parametrize("recipe", sorted(WHOLE))
def test_recipes_whose_experts_are_more_than_rows_are_refused(recipe):
    model = sparsify(build("llama"), recipe, **OPTIONS[recipe]).eval()
    with pytest.raises(ConfigError, match=r"Experts can be taken out where each has a row|cannot be made smaller"):
        prune_experts(model, 2, batches=text())


def test_groups_that_a_recipe_calls_devices_stay_what_they_were():
    model = sparsify(build("llama"), "deepseek-v2", num_experts=8, top_k=1, num_devices=2, devices_per_token=1).eval()
    router = prune_experts(model, 4, batches=text()).model.model.layers[0].mlp.moe.router
    assert (router.num_experts, router.groups.num_groups, router.groups.groups_kept) == (4, 2, 1)
