from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.grow.upcycle import upcycle
from moesaic.convert.layout.counts import shrinkable
from moesaic.convert.layout.dense import networks, run_dense
from moesaic.convert.shrink.calibration import calibrate
from moesaic.convert.shrink.siblings import SIBLINGS
from moesaic.convert.shrink.to_dense import Plan, to_dense
from moesaic.convert.weights.combine import take
from moesaic.convert.weights.joining import joined
from moesaic.core.errors import ConfigError
from moesaic.hf import sparsify
from moesaic.kernels.activations import silu
from tests.convert.plain import VOCABULARY, E, block_of, native
from tests.convert.shrink.test_merge_experts import with_copies
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.tiny import build


def text(count: int = 3) -> list[Tensor]:
    return [torch.randint(3, VOCABULARY, (2, 6)) for _ in range(count)]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def ours(recipe: str = "mixtral", **options: Any) -> Any:
    return sparsify(build("llama"), recipe, num_experts=4, init_std=0.3, **{"top_k": 2} | options).eval()


# --- exact where it can be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("recipe", ["mixtral", "deepseek-v3"])
def test_an_upcycled_model_becomes_the_dense_model_that_it_was(family, recipe):
    dense = build(family)
    options = {"shared": "silent"} if recipe == "deepseek-v3" else {}
    sparse = upcycle(dense, recipe, num_experts=4, top_k=2, **options).model
    back = to_dense(sparse, weights="uniform")
    ids = text(1)[0]
    assert float((logits(back.model, ids) - logits(dense, ids)).abs().max()) < 1e-5
    assert type(back.model) is type(dense)
    assert back.receipt.notes[0] == "what weights add up to was measured on random tokens"
    if recipe == "mixtral":
        assert back.model.config.intermediate_size == dense.config.intermediate_size
        for name, tensor in dense.state_dict().items():
            assert torch.allclose(back.model.state_dict()[name], tensor, atol=1e-6), name


def test_an_upcycled_gpt2_with_biases_in_its_networks_finds_its_way_back_too(tmp_path):
    dense = build("gpt2")
    for block in dense.transformer.h:
        torch.nn.init.zeros_(block.mlp.c_fc.bias)
        torch.nn.init.zeros_(block.mlp.c_proj.bias)
    sparse = sparsify(build("gpt2"), "mixtral", num_experts=2, top_k=2)
    with pytest.raises(ConfigError, match="are gated with silu, the dense model's networks are plain with gelu_tanh"):
        to_dense(sparse, weights="uniform")
    sparse = sparsify(dense, "dense", num_experts=1, activation="gelu_tanh").eval()
    back = to_dense(sparse, weights="uniform", out=tmp_path / "dense")
    ids = text(1)[0]
    assert float((logits(back.model, ids) - logits(sparse, ids)).abs().max()) < 1e-5
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "dense").transformer.h[0].mlp.c_fc.bias.any()


@written_for_this_transformers
@pytest.mark.parametrize("family", sorted(SIBLINGS))
def test_a_family_whose_experts_are_all_the_same_is_its_dense_sibling(family):
    made = tiny(family)
    has_norm = "norm_topk_prob" in vars(made.model.config.get_text_config())
    # What a token's weights add up to must not depend on the token: all experts chosen, or weights normalised.
    every = {"num_experts_per_tok": 8} if family.startswith(("deepseek_v2", "deepseek_ocr2")) else {}
    made = tiny(family, **(every or ({"norm_topk_prob": True} if has_norm else {})))
    state = made.model.state_dict()
    for layout in shrinkable(open_source(made.model).blueprint).values():
        stack = layout.read({name: state[name] for name in layout.weights})
        state |= layout.write(take(stack, torch.zeros(layout.num_experts, dtype=torch.int64)))
        if layout.shared is not None and layout.shared.token_gate is not None:
            state[layout.shared.token_gate] = torch.zeros_like(state[layout.shared.token_gate])
    made.model.load_state_dict(state)
    converted = to_dense(made.model, batches=[made.inputs], probe=made.inputs)
    assert converted.receipt.largest_logit_difference < 1e-5
    assert converted.model.config.model_type == SIBLINGS[made.model.config.model_type]
    assert not any("experts" in name for name in converted.model.state_dict() if "shared" not in name)


def test_permuted_copies_average_to_themselves_only_when_lined_up():
    model, ids = with_copies("mixtral"), text()
    aligned, as_they_are = (to_dense(model, batches=ids, align=align).receipt for align in (True, False))
    assert aligned.largest_logit_difference < 1e-5
    assert as_they_are.largest_logit_difference > 1e-2


def test_all_experts_side_by_side_are_exact_where_weights_are_constant(tmp_path):
    model = ours("mixtral", top_k=4)
    for block in model.model.layers:
        torch.nn.init.zeros_(block.mlp.moe.router.weight)
    converted = to_dense(model, method="concat", batches=text(), out=tmp_path / "dense")
    assert converted.receipt.largest_logit_difference < 1e-5
    assert converted.model.config.intermediate_size == 4 * 24
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = text(1)[0]
    assert torch.equal(logits(loaded, ids), logits(converted.model, ids))
    assert list(converted.receipt.dropped.values()) == ["a dense model has no router"] * 2


def test_shared_experts_are_laid_beside_exactly_and_a_gated_one_by_its_mean():
    model = native("qwen2_moe", norm_topk_prob=True)
    ids = text()
    stats = calibrate(model, ids)
    converted = to_dense(model, stats=stats, method="expert")
    block = block_of("qwen2_moe", model, 0)
    one = stats["model.layers.0.mlp.experts"]
    best = int(one.count_E.argmax())
    network = networks(converted.model)[0].read(converted.model.state_dict())
    x_TD = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        both = block.experts.gate_up_proj[best] @ x_TD.T
        expert = block.experts.down_proj[best] @ (silu.forward(both[:12]) * both[12:])
        expected = expert.T + one.shared_gate * block.shared_expert(x_TD)
    assert torch.allclose(run_dense(network, x_TD, silu), expected, atol=1e-6)
    assert network.hidden == 12 + 20
    assert f"times 1 and the shared expert, times {one.shared_gate:.3g}" in converted.receipt.notes[1]


def test_layers_that_were_dense_are_padded_to_the_size_of_the_others():
    model = sparsify(build("llama"), "mixtral", num_experts=4, top_k=2, layers=[1], init_std=0.3).eval()
    converted = to_dense(model, method="concat", hidden=48, batches=text())
    assert converted.model.config.intermediate_size == 48
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        assert torch.allclose(converted.model.model.layers[0].mlp(x), model.model.layers[0].mlp(x), atol=1e-6)
    assert converted.model.model.layers[0].mlp.up_proj.weight.shape == (48, 16)
    assert "padded with zeros from 24 neurons" in converted.receipt.notes[1]


# --- what is not exact is what it says ------------------------------------------------------------------------------


def test_experts_side_by_side_are_weighed_by_their_mean_weight_and_those_left_out_are_made_up_for():
    model, ids = native("mixtral"), text()
    one = calibrate(model, ids)["model.layers.0.mlp.experts"]
    mean = one.weight_E / one.num_tokens
    every = joined(one, method="concat", weights="frequency")
    assert every.kept == tuple(range(E))
    assert torch.allclose(every.scales, mean)
    few = joined(one, method="concat", weights="frequency", num_kept=3)
    best = sorted(sorted(range(E), key=lambda e: (-int(one.count_E[e]), e))[:3])
    assert few.kept == tuple(best)
    assert torch.allclose(few.scales, mean[best] / mean[best].sum())
    assert float(few.scales.sum()) == pytest.approx(1.0)


def test_the_number_that_weights_add_up_to_is_in_the_network():
    model = with_copies("deepseek_v3", n_group=2, num_experts_per_tok=2)
    ids = text()
    assert float(calibrate(model, ids)["model.layers.0.mlp.experts"].weight_E.sum()) == pytest.approx(
        2.5 * 36, rel=1e-5
    )
    assert to_dense(model, batches=ids).receipt.largest_logit_difference < 1e-5


@pytest.mark.parametrize("weights", ["frequency", "saliency", "uniform"])
@pytest.mark.parametrize("method", ["merge", "concat", "expert"])
def test_every_method_gives_a_model_that_runs_and_is_measured(method, weights):
    model = ours("qwen1.5-moe")
    converted = to_dense(model, method=method, weights=weights, batches=text())
    assert 0 < converted.receipt.largest_logit_difference < 100
    expert, shared = 24, 4 * 24
    assert converted.model.config.intermediate_size == shared + (4 * expert if method == "concat" else expert)


def test_distilling_closes_part_of_the_gap_that_merging_left():
    model, ids = ours(), text(4)
    merged = to_dense(model, batches=ids)
    distilled = to_dense(model, method="distill", batches=ids, steps=60, learning_rate=1e-2)
    gap = {
        name: float(sum((logits(one.model, batch) - logits(model, batch)).square().mean() for batch in ids))
        for name, one in (("merged", merged), ("distilled", distilled))
    }
    assert gap["distilled"] < 0.5 * gap["merged"]
    assert distilled.receipt.notes[-1].startswith("distilled for 60 steps: divergence of predictions ")
    assert distilled.receipt.method == "to_dense by distill"
    # Only networks were trained.
    new, old = distilled.model.state_dict(), model.state_dict()
    assert torch.equal(new["model.layers.0.self_attn.q_proj.weight"], old["model.layers.0.self_attn.q_proj.weight"])


def test_moments_are_averaged_and_not_scaled():
    model = ours("olmoe")
    source = open_source(model)
    plan, stats = Plan.of(source), calibrate(model, text())
    how = {path: joined(stats[path], method="merge", weights="uniform", stack=plan.stack(path)) for path in stats}
    change = plan.change(how, dict.fromkeys(stats, 1.0), method="to_dense")
    step = next(step for step in change.steps if step.gives)
    tensors = {name: torch.randn(source.names[name].shape) for name in step.takes}
    moved = step.moments(tensors)
    path = "model.layers.0.mlp.moe.experts"
    order = how[path].order_EF
    down = torch.stack([tensors[f"{path}.down_EFD"][e][order[e]] for e in range(4)]).mean(dim=0)
    assert torch.allclose(moved["model.layers.0.mlp.down_proj.weight"], down.T, atol=1e-6)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build_model", "arguments", "message"),
    [
        (lambda: native("gpt_oss"), {}, "A model of type gpt_oss has no dense sibling with the same attention"),
        (
            lambda: native("mixtral"),
            {"method": "sum"},
            "method must be one of merge, concat, expert, distill, got 'sum'",
        ),
        (
            lambda: native("mixtral"),
            {"weights": "even"},
            "weights must be one of frequency, saliency, uniform, got 'even'",
        ),
        (
            lambda: native("mixtral"),
            {"hidden": 24},
            "hidden is a choice of methods 'concat' and 'distill', got 24 with",
        ),
        (
            lambda: native("mixtral"),
            {"method": "concat", "hidden": 20},
            "hidden must be a multiple of an expert's 12 neurons, at most 8 times, got 20",
        ),
        (lambda: native("mixtral"), {}, "method='merge' and weights='frequency' needs text"),
        (lambda: native("mixtral"), {"method": "distill", "weights": "uniform"}, "needs text to see what experts do"),
        (
            lambda: ours("llama4", top_k=1),
            {},
            "cannot hold experts that weigh their input, which model.layers.0.mlp has",
        ),
        (
            lambda: ours("residual-moe", top_k=1, combine="learned"),
            {},
            "cannot hold a learned mix of routed and shared outputs",
        ),
        (lambda: ours("st-moe"), {}, "cannot hold a network after the experts"),
        (
            lambda: ours("gpt-oss"),
            {},
            "are gated with an activation of their own, the dense model's networks are gated with silu",
        ),
        (lambda: ours("switch", top_k=1), {}, "are plain with relu, the dense model's networks are gated with silu"),
        (lambda: build("llama"), {}, "LlamaForCausalLM has no MoE layers whose experts can be taken apart"),
    ],
)
def test_what_cannot_become_dense_is_refused_with_the_reason(build_model, arguments, message):
    with pytest.raises(ConfigError) as error:
        to_dense(build_model(), **arguments)
    assert message in str(error.value)


@written_for_this_transformers
def test_a_block_with_a_part_that_no_dense_network_has_is_refused(monkeypatch):
    made = tiny("axk1")
    monkeypatch.setitem(SIBLINGS, "axk1", "axk1")
    with pytest.raises(ConfigError, match=r"post_mlp_layernorm.weight is neither of the experts nor of the router"):
        to_dense(made.model, batches=[made.inputs])
