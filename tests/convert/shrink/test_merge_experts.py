from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.layout.dense import run_dense
from moesaic.convert.shrink.calibration import calibrate
from moesaic.convert.shrink.grouping import distances, grouped
from moesaic.convert.shrink.merge import Merging, merge_experts, merged
from moesaic.convert.shrink.prune import prune_experts
from moesaic.convert.shrink.saliency import StatsSum
from moesaic.convert.shrink.to_dense import to_dense
from moesaic.convert.weights.combine import (
    aligned_orders,
    average,
    concatenate,
    neuron_order,
    padded,
    permuted,
    scaled,
    shares,
    side_by_side,
    take,
)
from moesaic.convert.weights.stack import DenseFFN, ExpertStack
from moesaic.core.errors import ConfigError, ShapeError
from moesaic.hf import sparsify
from moesaic.kernels.activations import silu
from tests.convert.plain import VOCABULARY, E, block_of, experts_path, native
from tests.hf.tiny import build

NATIVE = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3")
X_TD = torch.randn(9, 6, dtype=torch.float64)


def text(count: int = 2) -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, (2, 6)) for _ in range(count)]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def network(hidden: int = 5, *, gated: bool = True, biased: bool = False) -> DenseFFN:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    biases = {"up_F": drawn(hidden), "down_D": drawn(6)} if biased else {}
    biases |= {"gate_F": drawn(hidden)} if biased and gated else {}
    return DenseFFN(
        gate_DF=drawn(6, hidden) if gated else None, up_DF=drawn(6, hidden), down_FD=drawn(hidden, 6), **biases
    )


def stack(count: int, **kinds: Any) -> ExpertStack:
    return ExpertStack.of([network(**kinds) for _ in range(count)])


KINDS = [{"gated": gated, "biased": biased} for gated in (True, False) for biased in (True, False)]


# --- the maths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS)
def test_neurons_in_another_order_change_nothing_and_are_found_back(kinds):
    one = network(**kinds)
    order = torch.tensor([3, 0, 4, 1, 2])
    mixed = permuted(ExpertStack.of([one, one]), torch.stack([torch.arange(5), order]))
    assert torch.allclose(run_dense(mixed.expert(1), X_TD, silu), run_dense(one, X_TD, silu), atol=1e-12)
    assert not torch.allclose(mixed.up_EDF[0], mixed.up_EDF[1])
    found = neuron_order(mixed, 0, 1)
    assert torch.equal(order[found], torch.arange(5))
    back = permuted(mixed, aligned_orders(mixed, [[0, 1]], torch.tensor([2.0, 1.0])))
    assert torch.equal(back.up_EDF[0], back.up_EDF[1])


def test_the_heaviest_expert_of_a_cluster_is_the_one_that_others_are_brought_in_line_with():
    one = stack(3)
    orders = aligned_orders(one, [[0, 2], [1]], torch.tensor([1.0, 9.0, 5.0]))
    assert torch.equal(orders[2], torch.arange(5))
    assert torch.equal(orders[1], torch.arange(5))
    assert torch.equal(orders[0], neuron_order(one, 2, 0))


@pytest.mark.parametrize("kinds", KINDS)
def test_an_average_is_that_of_plain_loops_and_experts_side_by_side_give_their_sum(kinds):
    experts, weight = stack(3, **kinds), torch.tensor([1.0, 0.0, 3.0])
    mean = average(experts, weight)
    for name, single in (("gate_EDF", "gate_DF"), ("up_EDF", "up_DF"), ("down_EFD", "down_FD"), ("down_ED", "down_D")):
        if getattr(experts, name) is not None:
            expected = 0.25 * getattr(experts, name)[0] + 0.75 * getattr(experts, name)[2]
            assert torch.allclose(getattr(mean, single), expected, atol=1e-12)
    wide = concatenate(experts, torch.tensor([0.5, -2.0, 1.0]))
    outputs = [run_dense(experts.expert(e), X_TD, silu) for e in range(3)]
    assert torch.allclose(run_dense(wide, X_TD, silu), 0.5 * outputs[0] - 2 * outputs[1] + outputs[2], atol=1e-10)
    assert wide.hidden == 15


@pytest.mark.parametrize("kinds", KINDS)
def test_networks_side_by_side_padded_and_scaled_compute_what_they_say(kinds):
    first, second = network(5, **kinds), network(3, gated=kinds["gated"])
    expected = run_dense(first, X_TD, silu) + run_dense(second, X_TD, silu)
    for left, right in ((first, second), (second, first)):
        assert torch.allclose(run_dense(side_by_side(left, right), X_TD, silu), expected, atol=1e-10)
    more = padded(first, 8)
    assert more.hidden == 8
    assert torch.allclose(run_dense(more, X_TD, silu), run_dense(first, X_TD, silu), atol=1e-12)
    assert torch.allclose(run_dense(scaled(first, 2.5), X_TD, silu), 2.5 * run_dense(first, X_TD, silu), atol=1e-10)


def test_what_does_not_fit_side_by_side_or_cannot_be_padded_or_averaged_is_refused():
    with pytest.raises(ShapeError, match="must both have a gate or both have none, got one of each"):
        side_by_side(network(), network(gated=False))
    with pytest.raises(ShapeError, match="A network of 5 neurons cannot be padded to 4"):
        padded(network(), 4)
    with pytest.raises(ConfigError, match=r"at least 0, got -1\.0"):
        shares(torch.tensor([1.0, -1.0]))
    assert shares(torch.zeros(4)).tolist() == [0.25] * 4


# --- clusters -------------------------------------------------------------------------------------------------------


def plain_average_linkage(distance: np.ndarray, to: int) -> list[list[int]]:
    clusters = [[index] for index in range(len(distance))]
    while len(clusters) > to:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]

        def apart(pair: tuple[int, int], clusters: list[list[int]] = clusters) -> float:
            return float(np.mean([distance[i, j] for i in clusters[pair[0]] for j in clusters[pair[1]]]))

        a, b = min(pairs, key=apart)
        joined = sorted(clusters[a] + clusters[b])
        clusters = [one for index, one in enumerate(clusters) if index not in (a, b)] + [joined]
    return sorted(clusters)


@pytest.mark.parametrize("to", [1, 2, 5, 9])
def test_clusters_are_those_of_average_linkage_in_plain_loops(to):
    points = torch.randn(9, 4, dtype=torch.float64)
    distance = torch.cdist(points, points)
    assert grouped(distance, to) == plain_average_linkage(distance.numpy(), to)


def test_copies_are_cut_into_as_many_clusters_as_were_asked_for():
    for to in range(1, 9):
        clusters = grouped(torch.zeros(8, 8), to)
        assert len(clusters) == to
        assert sorted(e for members in clusters for e in members) == list(range(8))


def test_clusters_do_not_cross_groups_and_stay_in_their_order():
    distance = torch.ones(8, 8) - torch.eye(8)
    distance[0, 7] = distance[7, 0] = 0.1
    distance[1, 3] = distance[3, 1] = 0.2
    clusters = grouped(distance, 4, groups=2)
    assert [1, 3] in clusters
    assert [sum(min(one) < 4 for one in clusters), [max(one) < 4 for one in clusters][:2]] == [2, [True, True]]
    with pytest.raises(ConfigError, match="A router that chooses among 2 groups needs as many experts in each, got 3"):
        grouped(distance, 3, groups=2)


def test_distances_are_those_of_plain_sums():
    experts, y_ETD = stack(4), torch.randn(4, 11, 6, dtype=torch.float64)
    sums = StatsSum(4)
    sums.add_every(y_ETD[:, :5])
    sums.add_every(y_ETD[:, 5:])
    stats, rows = sums.result(), torch.randn(4, 6)
    for a in range(4):
        for b in range(4):
            means = float((y_ETD[a].mean(dim=0) - y_ETD[b].mean(dim=0)).norm())
            functions = float((y_ETD[a] - y_ETD[b]).square().sum(dim=-1).mean().sqrt())
            parts = [(getattr(experts, name)[a] - getattr(experts, name)[b]).square().sum() for name in
                     ("gate_EDF", "up_EDF", "down_EFD")]  # fmt: skip
            assert float(distances("outputs", stats=stats)[a, b]) == pytest.approx(means, abs=1e-9)
            assert float(distances("functions", stats=stats)[a, b]) == pytest.approx(functions, abs=1e-6)
            assert float(distances("weights", stack=experts)[a, b]) == pytest.approx(float(sum(parts)) ** 0.5, abs=1e-6)
            assert float(distances("router", rows_ED=rows)[a, b]) == pytest.approx(float((rows[a] - rows[b]).norm()))


def test_a_distance_that_is_unknown_or_lacks_what_it_needs_is_refused():
    with pytest.raises(ConfigError, match="cluster must be one of outputs, functions, weights, router, got 'ward'"):
        distances("ward")
    with pytest.raises(ConfigError, match="needs statistics in which every expert ran on every token"):
        distances("outputs", stats=StatsSum(3).result())


# --- whole models ---------------------------------------------------------------------------------------------------


def with_copies(family: str, *, mixed: bool = True, **changes: Any) -> Any:
    """A model whose experts of one layer all compute the same, with their neurons in different orders."""
    model = native(family, **changes)
    source = open_source(model)
    from moesaic.convert.layout.layouts import moe_layouts

    state = model.state_dict()
    for layout in moe_layouts(source.blueprint).values():
        one = layout.read({name: state[name] for name in layout.weights})
        copies = take(one, torch.zeros(E, dtype=torch.int64))
        orders = torch.stack([torch.randperm(one.hidden) if mixed else torch.arange(one.hidden) for _ in range(E)])
        state |= layout.write(permuted(copies, orders))
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("cluster", ["outputs", "functions", "weights", "router"])
@pytest.mark.parametrize("family", NATIVE)
def test_merging_copies_changes_nothing_whatever_the_order_of_their_neurons(family, cluster):
    # Where a token's weights add up to the same number always.
    changes = {"qwen2_moe": {"norm_topk_prob": True}, "deepseek_v3": {"n_group": 2, "num_experts_per_tok": 2}}
    model = with_copies(family, **changes.get(family, {}))
    ids = text()
    converted = merge_experts(model, 4, cluster=cluster, batches=ids)
    assert float((logits(converted.model, ids[0]) - logits(model, ids[0])).abs().max()) < 1e-5
    assert block_of(family, converted.model, 0).experts.down_proj.shape[0] == 4
    if cluster == "weights":
        unaligned = merge_experts(model, 4, cluster=cluster, align=False, batches=ids)
        assert float((logits(unaligned.model, ids[0]) - logits(model, ids[0])).abs().max()) > 1e-3


def test_a_merged_expert_is_the_frequency_weighted_average_of_its_members_and_so_is_its_row():
    model, ids = native("mixtral"), text()
    stats = calibrate(model, ids, every_expert=True)
    converted = merge_experts(model, 4, stats=stats, align=False)
    one = stats[experts_path(1)]
    clusters = grouped(distances("outputs", stats=one), 4)
    words = ", ".join("+".join(map(str, members)) for members in clusters)
    assert converted.receipt.notes[2] == f"{experts_path(1)}: 8 experts merged to 4; {words}"
    new, old = (block_of("mixtral", one, 1) for one in (converted.model, model))
    for index, members in enumerate(clusters):
        counts = [int(one.count_E[e]) for e in members]
        for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            rows = old.get_parameter(name)
            expected = sum(count * rows[e] for count, e in zip(counts, members, strict=True)) / sum(counts)
            assert torch.allclose(new.get_parameter(name)[index], expected, atol=1e-12)


def test_the_row_of_the_dominant_member_may_stand_for_its_cluster():
    model, ids = native("mixtral"), text()
    stats = calibrate(model, ids, every_expert=True)
    converted = merge_experts(model, 4, stats=stats, router="dominant")
    one = stats[experts_path(0)]
    heads = [max(members, key=lambda e: int(one.count_E[e])) for members in grouped(distances("outputs", stats=one), 4)]
    new, old = (block_of("mixtral", one, 0) for one in (converted.model, model))
    assert torch.equal(new.gate.weight, old.gate.weight[heads])
    assert converted.receipt.notes[0] == "router rows: dominant of each cluster's"


def test_groups_and_selection_biases_survive_a_merge():
    model = native("deepseek_v3", n_group=2, topk_group=1, num_experts_per_tok=2)
    converted = merge_experts(model, 4, batches=text(), average="uniform")
    config = converted.model.config
    assert (config.n_routed_experts, config.n_group, config.topk_group) == (4, 2, 1)
    words = converted.receipt.notes[1].split("; ")[1].split(", ")
    clusters = [[int(e) for e in word.split("+")] for word in words]
    assert [max(members) < 4 for members in clusters] == [True, True, False, False]
    bias = block_of("deepseek_v3", model, 0).gate.e_score_correction_bias
    expected = torch.stack([bias[members].mean() for members in clusters])
    assert torch.allclose(block_of("deepseek_v3", converted.model, 0).gate.e_score_correction_bias, expected)


def test_two_pairs_of_near_copies_are_found_and_cost_less_than_taking_one_of_each_pair_away():
    model = native("mixtral", num_experts_per_tok=2)
    with torch.no_grad():
        for layer in (0, 1):
            block = block_of("mixtral", model, layer)
            for e in (1, 3, 5, 7):
                for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
                    weight = block.get_parameter(name)
                    weight[e] = weight[e - 1] + 0.05 * torch.randn_like(weight[e])
    ids = text(6)
    stats = calibrate(model, ids, every_expert=True)
    converted = merge_experts(model, 4, stats=stats, router="mean")
    assert converted.receipt.notes[1].endswith("8 experts merged to 4; 0+1, 2+3, 4+5, 6+7")
    pruned = prune_experts(model, 4, stats=stats)
    gap = {
        name: float((logits(one.model, ids[0]) - logits(model, ids[0])).square().mean())
        for name, one in (("merged", converted), ("pruned", pruned))
    }
    # Both choices of a token went to one pair: now its second goes elsewhere, so that neither is without loss.
    assert 0 < gap["merged"] < gap["pruned"]


def test_our_models_merge_too_and_load_again(tmp_path):
    model = sparsify(build("llama"), "qwen1.5-moe", num_experts=4, top_k=2, init_std=0.3).eval()
    converted = merge_experts(model, [3, 2], batches=text(), out=tmp_path / "new")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert [block.mlp.moe.num_experts for block in loaded.model.layers] == [3, 2]
    ids = text(1)[0]
    assert torch.equal(logits(loaded, ids), logits(converted.model, ids))
    assert torch.equal(loaded.model.layers[0].mlp.moe.shared.up_DF, model.model.layers[0].mlp.moe.shared.up_DF)


def test_moments_are_averaged_as_their_weights_are():
    model = sparsify(build("llama"), "mixtral", num_experts=4, top_k=2).eval()
    source = open_source(model)
    order = torch.stack([torch.randperm(24) for _ in range(4)])
    plan = Merging(clusters=[[0, 2], [1, 3]], weight_E=torch.tensor([1.0, 1.0, 3.0, 0.0]), order_EF=order)
    change = merged(source, {f"model.layers.{layer}.mlp.moe.experts": plan for layer in (0, 1)})
    tensors = {name: torch.randn(source.names[name].shape) for name in change.steps[0].takes}
    moved = change.steps[0].moments(tensors)
    up = tensors["model.layers.0.mlp.moe.experts.up_EDF"]
    expected = 0.25 * up[0][:, order[0]] + 0.75 * up[2][:, order[2]]
    assert torch.allclose(moved["model.layers.0.mlp.moe.experts.up_EDF"][0], expected, atol=1e-6)
    assert torch.equal(moved["model.layers.0.mlp.moe.experts.down_EFD"][1],
                       tensors["model.layers.0.mlp.moe.experts.down_EFD"][1][order[1]])  # fmt: skip


def test_what_cannot_be_merged_is_refused_with_the_reason():
    model = native("mixtral")
    with pytest.raises(ConfigError, match="merge_experts needs text to see what experts do, or statistics"):
        merge_experts(model, 4)
    with pytest.raises(ConfigError, match="got 'median' and 'mean'"):
        merge_experts(model, 4, average="median")
    with pytest.raises(ConfigError, match="Experts to merge to must be between 1 and 8"):
        merge_experts(model, 9, batches=text())
    with pytest.raises(ConfigError, match="every expert ran on every token"):
        merge_experts(model, 4, stats=calibrate(model, text()))
    before = copy.deepcopy(model.state_dict())
    merge_experts(model, 4, cluster="weights", average="uniform")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("make", [lambda m, **k: merge_experts(m, 4, **k), lambda m, **k: prune_experts(m, 4, **k),
                                  to_dense])  # fmt: skip
def test_half_precision_stays_what_it_is(make, tmp_path):
    # transformers' grouped products want strides of 16 bytes.
    model = native("mixtral", intermediate_size=16).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "old")
    ids = text()
    converted = make(tmp_path / "old", batches=ids, out=tmp_path / "new")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    assert math.isfinite(converted.receipt.largest_logit_difference)
