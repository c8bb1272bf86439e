from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.convert.shrink.calibration import calibrate
from moesaic.convert.shrink.prune import prune_experts
from moesaic.convert.shrink.saliency import ExpertStats, StatsSum, super_experts
from moesaic.core.errors import ConfigError
from moesaic.hf import adopt, sparsify
from tests.convert.plain import (
    CHOICES,
    VOCABULARY,
    E,
    block_of,
    experts_path,
    largest_error,
    native,
    plain_expert,
    plain_stats,
)
from tests.hf.tiny import build

NATIVE = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3")


def batches(count: int = 2, *, padded: bool = False) -> list[dict[str, Tensor]]:
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (2, 6))
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :2] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def seen_tokens(model: Any, block: Any, given: list[dict[str, Tensor]]) -> list[Tensor]:
    """What a block reads, without padding, in float64."""
    read: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _block, args: read.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for batch in given:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].reshape(-1).bool() for batch in given]
    return [x_D for x_TD, mask in zip(read, masks, strict=True) for x_D in x_TD[mask].double()]


def truth(family: str, model: Any, layer: int, given: list[dict[str, Tensor]], scale: float = 1.0) -> dict[str, Any]:
    block = block_of(family, model, layer)
    tokens = seen_tokens(model, block, given)
    block = copy.deepcopy(block).double()
    with torch.no_grad():
        rows = [(t, e, scale * w) for t, x_D in enumerate(tokens) for e, w in CHOICES[family](block, x_D)]
        return plain_stats(tokens, rows, lambda e, x_D: plain_expert(family, block.experts, e, x_D), E)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", NATIVE)
def test_statistics_of_native_families_are_those_of_plain_loops(family, implementation, padded):
    model = native(family)
    # Only gpt-oss's router weighs in float64 where its model is; and grouped_mm knows no float64.
    allowed = 1e-12 if family == "gpt_oss" else 3e-7
    if implementation == "grouped_mm":
        model, allowed = model.float(), 3e-6
    model.set_experts_implementation(implementation)
    given = batches(padded=padded)
    stats = calibrate(model, given)
    assert list(stats) == [experts_path(0), experts_path(1)]
    for layer in (0, 1):
        assert largest_error(stats[experts_path(layer)], truth(family, model, layer, given)) < allowed


@pytest.mark.parametrize("family", NATIVE)
def test_weights_that_were_not_applied_would_be_noticed(family):
    model, given = native(family), batches()
    stats = calibrate(model, given)[experts_path(0)]
    assert largest_error(stats, truth(family, model, 0, given, scale=1.001)) > 5e-4


def test_the_weights_of_a_second_top_k_over_the_logits_would_be_noticed(monkeypatch):
    import tests.convert.plain as plain

    model, given = native("deepseek_v3"), batches()
    stats = calibrate(model, given)[experts_path(0)]

    def without_groups_and_bias(block, x_D):
        scores = (block.gate.weight @ x_D).sigmoid().tolist()
        chosen = plain._best(scores, plain.K)
        return [(e, 2.5 * scores[e] / sum(scores[c] for c in chosen)) for e in chosen]

    monkeypatch.setitem(CHOICES, "deepseek_v3", without_groups_and_bias)
    assert largest_error(stats, truth("deepseek_v3", model, 0, given)) > 1e-2


def ours(recipe: str, **options: Any) -> Any:
    model = sparsify(build("llama"), recipe, num_experts=4, init_std=0.3, **options)
    for name, buffer in model.named_buffers():
        if name.endswith("bias_E"):
            buffer.normal_(std=0.5)
    return model.double().eval()


def our_truth(model: Any, layer: int, given: list[dict[str, Tensor]]) -> dict[str, Any]:
    """From the routing that the layer returns for the tokens that it read, and experts in plain loops."""
    block = model.model.layers[layer].mlp
    tokens = seen_tokens(model, block, given)
    experts = block.moe.experts
    with torch.no_grad():
        routing = block.moe(torch.stack(tokens))[1]
        rows = [
            (int(t), int(e), float(w))
            for t, e, w, kept in zip(routing.token_N, routing.expert_N, routing.weight_N, routing.kept_N, strict=True)
            if kept
        ]

        def expert(e: int, x_D: Tensor) -> Tensor:
            act = experts.activation.forward
            up = x_D @ experts.up_EDF[e]
            hidden = act(up) if not hasattr(experts, "gate_EDF") else act(x_D @ experts.gate_EDF[e]) * up
            return hidden @ experts.down_EFD[e]

        return plain_stats(tokens, rows, expert, 4)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("mixtral", {"top_k": 2}),
        ("deepseek-v3", {"top_k": 2, "num_groups": 2, "groups_kept": 1}),
        ("qwen1.5-moe", {"top_k": 2}),
        ("relu", {"top_k": 2}),
        ("switch", {"capacity_factor": 8.0}),
    ],
)
def test_statistics_of_our_models_are_those_of_plain_loops(recipe, options):
    model, given = ours(recipe, **options), batches(padded=True)
    stats = calibrate(model, given)
    assert list(stats) == ["model.layers.0.mlp.moe.experts", "model.layers.1.mlp.moe.experts"]
    for layer, one in enumerate(stats.values()):
        assert largest_error(one, our_truth(model, layer, given)) < 1e-11


def test_an_expert_that_weighs_its_input_is_credited_with_what_it_added():
    model = ours("llama4", top_k=1)
    given = batches(1)
    stats = calibrate(model, given)["model.layers.0.mlp.moe.experts"]
    block = model.model.layers[0].mlp
    x_TD = torch.stack(seen_tokens(model, block, given))
    with torch.no_grad():
        routing = block.moe.router(x_TD)
        added_E = torch.zeros(4, dtype=torch.float64)
        for t, e, w in zip(routing.token_N, routing.expert_N, routing.weight_N, strict=True):
            x_D = x_TD[t] * w
            experts = block.moe.experts
            gate = x_D @ experts.gate_EDF[e]
            added_E[e] += float((gate * gate.sigmoid() * (x_D @ experts.up_EDF[e]) @ experts.down_EFD[e]).norm())
    assert torch.allclose(stats.contribution_E, added_E, rtol=1e-9)
    assert not torch.allclose(stats.weight_E * stats.norm_E / stats.count_E.clamp_min(1), added_E, rtol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_every_expert_on_every_token_gives_means_and_products_of_outputs(family):
    model, given = native(family), batches(padded=True)
    stats = calibrate(model, given, every_expert=True)[experts_path(1)]
    block = block_of(family, model, 1)
    tokens = seen_tokens(model, block, given)
    with torch.no_grad():
        y_ETD = torch.stack(
            [torch.stack([plain_expert(family, block.experts, e, x_D) for x_D in tokens]) for e in range(E)]
        )
    assert stats.every_ED is not None
    assert stats.product_EE is not None
    assert torch.allclose(stats.every_ED, y_ETD.mean(dim=1), rtol=1e-9)
    assert torch.allclose(stats.product_EE, torch.einsum("atd,btd->ab", y_ETD, y_ETD) / len(tokens), rtol=1e-9)


def test_our_models_can_run_every_expert_too():
    model, given = ours("mixtral", top_k=2), batches(padded=True)
    stats = calibrate(model, given, every_expert=True)["model.layers.0.mlp.moe.experts"]
    block = model.model.layers[0].mlp
    x_TD = torch.stack(seen_tokens(model, block, given))
    experts = block.moe.experts
    with torch.no_grad():
        gate = torch.einsum("td,edf->etf", x_TD, experts.gate_EDF)
        up = torch.einsum("td,edf->etf", x_TD, experts.up_EDF)
        y_ETD = torch.einsum("etf,efd->etd", gate * gate.sigmoid() * up, experts.down_EFD)
    assert torch.allclose(stats.every_ED, y_ETD.mean(dim=1), rtol=1e-9)


@pytest.mark.parametrize("kind", ["qwen1.5-moe", "qwen2_moe"])
def test_the_mean_gate_of_a_shared_expert_is_measured_without_padding(kind):
    model = native(kind) if kind == "qwen2_moe" else ours(kind, top_k=2)
    given = batches(padded=True)
    one = next(iter(calibrate(model, given).values()))
    block = model.model.layers[0].mlp
    x_TD = torch.stack(seen_tokens(model, block, given))
    with torch.no_grad():
        logits = block.shared_expert_gate(x_TD) if kind == "qwen2_moe" else x_TD @ block.moe.shared.token_gate_D
    assert one.shared_gate == pytest.approx(float(logits.sigmoid().mean()), rel=1e-9)
    assert one.shared_gate != 1.0


def test_memory_does_not_grow_with_the_rows_of_a_batch(monkeypatch):
    import moesaic.convert.shrink.watch as module

    model, given = native("mixtral"), batches()
    whole = calibrate(model, given, every_expert=True)
    monkeypatch.setattr(module, "_NUMBERS", 40)
    cut = calibrate(model, given, every_expert=True)
    for path, one in whole.items():
        assert torch.allclose(one.contribution_E, cut[path].contribution_E, rtol=1e-12)
        assert torch.allclose(one.product_EE, cut[path].product_EE, rtol=1e-12)


def test_calibration_leaves_the_model_as_it_was_and_stops_at_enough_tokens():
    model = ours("mixtral", top_k=2)
    model.model.layers[0].train()
    before = {name: part.training for name, part in model.named_modules()}
    stats = calibrate(model, batches(5), max_tokens=20)
    assert next(iter(stats.values())).num_tokens == 24
    assert {name: part.training for name, part in model.named_modules()} == before
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_a_model_without_experts_and_a_calibration_without_text_are_refused():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts that can be looked at"):
        calibrate(build("llama"), batches())
    with pytest.raises(ConfigError, match="calibrate needs at least one batch with tokens, got none"):
        calibrate(native("mixtral"), [])


def test_layers_without_a_routing_table_are_refused():
    with pytest.warns(UserWarning, match="later tokens"):
        model = sparsify(build("llama"), "soft-moe", num_experts=4)
    with pytest.raises(ConfigError, match=r"got SoftMoE at model\.layers\.0\.mlp"):
        calibrate(model, batches())


def stats_of(largest_E: list[float]) -> ExpertStats:
    sums = StatsSum(len(largest_E))
    sums.largest_E += torch.tensor(largest_E, dtype=torch.float64)
    return sums.result()


def test_super_experts_are_rare_outliers_of_the_first_three_quarters():
    quiet = [1.0] * 60
    stats = {f"{index}": stats_of(quiet) for index in range(4)}
    stats["1"] = stats_of([500.0, *quiet[1:]])
    stats["3"] = stats_of([*quiet[1:], 400.0])
    found = super_experts(stats)
    assert {layer: mask.nonzero().flatten().tolist() for layer, mask in found.items()} == {
        "0": [],
        "1": [0],
        "2": [],
        "3": [],
    }


def test_experts_that_served_nobody_are_worth_nothing_and_an_unknown_ranking_is_refused():
    sums = StatsSum(3)
    sums.add_rows(torch.tensor([1, 1]), torch.tensor([0.5, 0.25]), torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    stats = sums.result()
    assert stats.saliency("reap").tolist() == [0.0, 1.5, 0.0]
    assert stats.saliency("ean").tolist() == [0.0, 7.0, 0.0]
    assert stats.mean_ED.tolist() == [[0.0, 0.0], [1.5, 3.0], [0.0, 0.0]]
    with pytest.raises(ConfigError, match="by must be one of reap, frequency, ean, weight, got 'norm'"):
        stats.saliency("norm")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_an_adopted_model_is_calibrated_and_made_smaller_as_the_family_that_it_is(family):
    model, given = native(family).float(), batches(padded=True)
    before = calibrate(model, given)
    adopt(model)
    after = calibrate(model, given)
    assert list(after) == list(before)
    for path, one in before.items():
        assert torch.equal(one.count_E, after[path].count_E)
        assert torch.allclose(one.contribution_E, after[path].contribution_E, rtol=1e-4)
    if family != "deepseek_v3":
        smaller = prune_experts(model, 4, stats=after).model
        assert type(smaller).__name__ == type(native(family)).__name__
