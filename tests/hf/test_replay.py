"""A replay sends each token where a trace says, with today's scores, however the tokens come."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import moesaic as mz
from moesaic import hf
from moesaic.core.errors import ConfigError
from moesaic.telemetry import RoutingTrace
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.test_adopt_every_family import apart, main_output
from tests.hf.test_forward import padded, sparse
from tests.hf.tiny import batch, gradients, recompute

pytestmark = written_for_this_transformers

NATIVE = (
    "mixtral",
    "deepseek_v3/groups",
    "gpt_oss",
    "qwen3_moe",
    "gemma4",
    "inkling",  # shared experts join the normalisation
    "zaya",  # a skip
    "jetmoe",  # attention routes too
    "llama4",  # weighs what goes in
    "dbrx",
    "deepseek_v4",  # the first layer looks choices up by token id
    "ernie4_5_vl_moe",  # routers that read some of the tokens
    "doge",
    "phimoe",
    "minimax_m2",  # the block passes the bias on
)
OURS = ("ours/mixtral", "ours/deepseek-v3")


def built(name: str):
    """A model whose routing is seen, and inputs with padding on the left."""
    origin, _, recipe = name.partition("/")
    if origin == "ours":
        inputs = padded(batch("llama"), "left")
        del inputs["labels"]
        return sparse("llama", recipe), inputs
    made = tiny(name)
    return mz.adopt(made.model), made.inputs


def backward(model, inputs):
    model.zero_grad()
    output = main_output(model(**inputs))
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), gradients(model)


def move_routers(model) -> None:
    """Another router than the one that was recorded."""
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in router_weights(model):
            weight.add_(torch.randn_like(weight))


def router_weights(model) -> list[torch.Tensor]:
    found = []
    for layer in hf.moe_layers(model).values():
        reporter = getattr(layer, "reporter", None)
        if reporter is None:
            found.append(layer.router.weight)
        elif layer.spec.is_learned:
            name = reporter.adoption.row.weight
            holder = reporter if hasattr(reporter, name.partition(".")[0]) else reporter.router
            found.append(holder.get_parameter(name))
    return found


@pytest.mark.parametrize("name", [*NATIVE, *OURS])
def test_replaying_the_very_trace_changes_nothing(name):
    model, inputs = built(name)
    with mz.record(model) as trace:
        before, gradient = backward(model, inputs)
    with hf.replay(model, trace), mz.record(model) as again:
        after, replayed = backward(model, inputs)
    assert apart(after, before) <= 1e-6
    assert np.array_equal(again.expert, trace.expert)
    np.testing.assert_allclose(again.weight, trace.weight, rtol=1e-5, atol=1e-6)
    assert replayed.keys() == gradient.keys()
    for key, wanted in gradient.items():
        assert apart(replayed[key], wanted) <= 1e-5, key


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", [*NATIVE, *OURS])
def test_routers_that_have_moved_on_choose_as_then_and_learn_by_their_scores_of_now(name, recomputes):
    if recomputes and name == "jetmoe":
        pytest.skip("transformers has no activation checkpointing for JetMoE")
    model, inputs = built(name)
    with torch.no_grad(), mz.record(model) as trace:
        model(**inputs)
    move_routers(model)
    if recomputes:
        recompute(model)
    model.train()
    with mz.record(model) as free:
        backward(model, inputs)
    with hf.replay(model, trace), mz.record(model) as held:
        output = main_output(model(**inputs))
    # Recomputed after the block has ended, as a Trainer's backward may be.
    model.zero_grad()
    output.square().sum().backward()
    assert not np.array_equal(free.expert, trace.expert)
    assert np.array_equal(held.expert, trace.expert)
    assert np.abs(held.weight - trace.weight).max() > 1e-3
    for weight in router_weights(model):
        assert weight.grad is not None
        assert weight.grad.any()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "ernie4_5_vl_moe", *OURS])
def test_recomputed_activations_take_the_same_choices(name):
    model, inputs = built(name)
    with torch.no_grad(), mz.record(model) as trace:
        model(**inputs)
    move_routers(model)
    with hf.replay(model.train(), trace):
        expected = backward(model, inputs)
    recompute(model)
    with hf.replay(model, trace):
        found = backward(model, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in (*NATIVE, *OURS) if name != "ernie4_5_vl_moe"])
def test_what_was_written_token_by_token_is_replayed_as_a_whole(name):
    model, inputs = built(name)
    start = inputs["input_ids"].shape[1]
    with torch.no_grad(), mz.record(model) as written:
        answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert answer.shape[1] == start + 4
    move_routers(model)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(answer), 3, dtype=torch.int64)], dim=1)
    whole = {"input_ids": answer[:, :-1], "attention_mask": mask}
    with hf.replay(model.train(), written), mz.record(model) as now:
        _, gradient = backward(model, whole)
    assert now.num_tokens == written.num_tokens == int(mask.sum())
    assert choices(now) == choices(written)
    assert all(gradient[name].isfinite().all() for name in gradient)
    assert all(weight.grad.any() for weight in router_weights(model))


def choices(trace: RoutingTrace) -> dict[tuple[int, int, int, int], int]:
    """The expert of each row, by layer, sequence, position and choice."""
    columns = (trace.layer, trace.sequence, trace.position, trace.choice)
    return dict(zip(zip(*(column.tolist() for column in columns), strict=True), trace.expert.tolist(), strict=True))


def test_batches_are_replayed_in_their_order_from_a_trace_that_was_saved(tmp_path):
    pytest.importorskip("pyarrow")
    model, _ = built("mixtral")
    torch.manual_seed(0)
    batches = [torch.randint(3, 90, (2, length)) for length in (6, 4, 5)]
    with torch.no_grad(), mz.record(model) as trace:
        for ids in batches:
            model(ids)
    trace = RoutingTrace.load(trace.save(tmp_path / "trace.parquet"))
    move_routers(model)
    with torch.no_grad(), hf.replay(model, trace), mz.record(model) as again:
        for ids in batches:
            model(ids)
    assert choices(again) == choices(trace)


def test_padding_is_where_the_router_sends_it_now():
    made = tiny("mixtral")
    model, chosen = mz.adopt(made.model), []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _m, _a, output: chosen.append(output[2]))
    with torch.no_grad(), mz.record(model) as trace:
        model(**made.inputs)
    with torch.no_grad(), hf.replay(model, trace):
        model(**made.inputs)
    assert torch.equal(*chosen)
    assert (made.inputs["attention_mask"] == 0).sum() == 2


def test_tokens_of_two_routers_have_the_places_of_their_sequence():
    made = tiny("ernie4_5_vl_moe")
    with torch.no_grad(), mz.record(made.model) as trace:
        made.model(**made.inputs)
    names, is_vision = trace.metadata.layer_names, made.inputs["moe_mm_token_type_ids"].bool()
    for sequence, first in ((0, 0), (1, 2)):  # the second begins with two places of padding
        for kind, wanted in (("text", ~is_vision), ("vision", is_vision)):
            layer = names.index(f"model.language_model.layers.1.mlp.{kind}_moe")
            rows = trace.where((trace.layer == layer) & (trace.sequence == sequence) & (trace.choice == 0))
            places = [place - first for place in wanted[sequence].nonzero()[:, 0].tolist() if place >= first]
            assert rows.position.tolist() == places
            ids = made.inputs["input_ids"][sequence, first:]
            assert rows.token_id.tolist() == ids[places].tolist()


def test_a_model_that_was_not_recorded_is_left_alone():
    (model, inputs), (other, _) = built("mixtral"), built("qwen3_moe")
    with torch.no_grad():
        expected = other(**inputs).logits
        with mz.record(model) as trace:
            model(**inputs)
        with hf.replay(model, trace):
            torch.testing.assert_close(other(**inputs).logits, expected, rtol=0, atol=0)


def test_replay_has_one_name_however_often_it_is_asked_for():
    assert callable(hf.replay)
    assert hf.replay is hf.replay


# --- refusals -------------------------------------------------------------------------------------------------------


def recorded(name: str):
    model, inputs = built(name)
    with torch.no_grad(), mz.record(model) as trace:
        model(**inputs)
    return model, inputs, trace


def refusal(model, trace, inputs=None) -> str:
    def run() -> None:
        with torch.no_grad(), hf.replay(model, trace):
            if inputs is not None:
                model(**inputs)

    with pytest.raises(ConfigError) as error:
        run()
    return str(error.value)


def test_a_trace_of_other_layers_is_refused():
    _, _, trace = recorded("mixtral")
    model, _ = built("deepseek_v3")
    assert refusal(model, trace) == (
        "replay needs a model with the layers of the trace, 3 (model.layers.0.mlp, model.layers.1.mlp, …), got 2 "
        "(model.layers.1.mlp, model.layers.2.mlp). Replay on the model that was recorded, adopted if it is one of "
        "transformers."
    )
    assert refusal(tiny("mixtral").model, trace).endswith(
        "got 0 (). Replay on the model that was recorded, adopted if it is one of transformers."
    )


@pytest.mark.parametrize(
    ("changes", "trace_has", "model_has"),
    [
        ({"num_local_experts": 6}, "2 of 8", "2 of 6"),
        ({"num_experts_per_tok": 3}, "2 of 8", "3 of 8"),
    ],
)
def test_a_trace_of_other_experts_or_choices_is_refused(changes, trace_has, model_has):
    _, _, trace = recorded("mixtral")
    assert refusal(mz.adopt(tiny("mixtral", **changes).model), trace) == (
        f"replay needs a router that chooses {trace_has} experts in layer model.layers.0.mlp, as the trace does, got "
        f"one that chooses {model_has}. Replay on the model that was recorded."
    )


def test_tokens_that_the_trace_does_not_have_are_refused():
    model, inputs, trace = recorded("mixtral")
    longer = {name: torch.cat([value, torch.ones_like(value[:, :1])], dim=1) for name, value in inputs.items()}
    assert refusal(model, trace, longer) == (
        "The trace has no row for sequence 0, position 7 in layer model.layers.0.mlp. Replay the batches that were "
        "recorded, in their order; the last token that generate writes is read by no forward."
    )
    part = trace.where(trace.layer != 1)
    assert refusal(model, part, inputs).startswith(
        "The trace has no row for sequence 0, position 0 in layer model.layers.1.mlp."
    )

    def twice() -> None:
        with torch.no_grad(), hf.replay(model, trace):
            model(**inputs)
            model(**inputs)

    with pytest.raises(ConfigError, match="no row for sequence 2, position 0"):
        twice()


@pytest.mark.parametrize(
    ("family", "block", "path"),
    [
        ("switch_transformers", "SwitchTransformersSparseMLP", "encoder.block.0.layer.1.mlp"),
        ("nllb_moe", "NllbMoeSparseMLP", "encoder.layers.0.ffn"),
        ("vitpose_backbone", "VitPoseBackboneMoeMLP", "encoder.layer.0.mlp"),
    ],
)
def test_a_choice_that_hangs_on_the_batch_or_comes_from_outside_is_refused(family, block, path):
    made = tiny(family)
    with torch.no_grad(), mz.record(mz.adopt(made.model)) as trace:
        made.model(**made.inputs)
    assert refusal(made.model, trace) == (
        f"replay needs routers in which each token's choice can be given, got {block} at "
        f"{path.removeprefix('model.')}, whose choices hang on the batch or come from outside. Leave replay out."
    ).replace("at encoder.layers", "at model.encoder.layers")


@pytest.mark.filterwarnings("ignore:In recipe expert-choice:UserWarning")
def test_our_own_layers_whose_choice_hangs_on_the_batch_are_refused():
    model = sparse("llama", "expert-choice")
    with torch.no_grad(), mz.record(model) as trace:
        model(**batch("llama"))
    assert "got SparseBlock at model.layers.0.mlp, whose choices hang on the batch" in refusal(model, trace)


def test_a_trace_with_more_choices_for_some_tokens_is_refused():
    model, _, trace = recorded("mixtral")
    ragged = trace.where((trace.choice == 0) | (trace.position > 2))
    assert refusal(model, ragged) == (
        "replay needs a trace with as many choices for every token, got 1 to 2 in layer model.layers.0.mlp. Traces of "
        "routers with any number of experts cannot be replayed."
    )
    assert replace(ragged.metadata) == copy.copy(trace.metadata)
