"""Adopted models take the right step: however a batch is cut, with recomputed activations, in transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import Trainer

import moesaic as mz
from moesaic import hf
from moesaic.core.errors import ConfigError
from moesaic.hf.scope import listening
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.test_accumulation import Rows, arguments
from tests.hf.test_adopt_training_losses import Losses, labelled
from tests.hf.test_recompute import REENTRANT
from tests.hf.tiny import CHECKPOINTING, gradients, recompute, recomputes

pytestmark = [written_for_this_transformers, pytest.mark.filterwarnings("ignore:.*use_cache:UserWarning")]

EXACT = {"rtol": 0, "atol": 0}
# Plain blocks, biases, a norm before the router, state spaces, and blocks of our own.
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "gemma4", "jamba", "zaya", "llama4", "dbrx", "doge", "longcat_flash")
BALANCE = {"switch": 0.5, "z": 0.1, "sequence": 0.3, "global-batch": 0.2}


def adopted(family, balance=BALANCE, **changes):
    made = tiny(family, **changes)
    return mz.adopt(made.model, balance=balance).train(), made


def uneven(made):
    """Two batches with different padding."""
    first, second = labelled(made), labelled(made)
    second["attention_mask"] = torch.ones_like(second["attention_mask"])
    second["attention_mask"][:, :3] = 0
    second["labels"] = second["input_ids"].masked_fill(second["attention_mask"] == 0, -100)
    return [first, second]


def predicted(inputs) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def backward(model, *batches, **kwargs) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    for inputs in batches:
        model(**inputs, **kwargs).loss.backward()
    return gradients(model)


# --- accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "jetmoe"])
def test_accumulated_gradients_are_the_mean_over_calls_weighted_by_predicted_tokens(family):
    model, made = adopted(family)
    parts = uneven(made)
    counts = [predicted(part) for part in parts]
    accumulated = backward(model, *parts, num_items_in_batch=torch.tensor(sum(counts)))
    model.zero_grad()
    for part, count in zip(parts, counts, strict=True):
        (model(**part).loss * count / sum(counts)).backward()
    assert counts == [11, 8]
    torch.testing.assert_close(accumulated, gradients(model))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "llama4", "dbrx"])
def test_a_per_token_loss_accumulates_to_that_of_one_big_batch(family):
    model, made = adopted(family, {"z": 0.5})
    whole = {name: torch.cat([part[name] for part in uneven(made)]) for name in labelled(made)}
    # 12 tokens and 8: as many labels of each half, to the same share.
    for sequence, first in enumerate((1, 2, 3, 3)):
        whole["labels"][sequence, first] = -100
    halves = [{name: value[half] for name, value in whole.items()} for half in (slice(0, 2), slice(2, 4))]
    assert [predicted(half) for half in halves] == [9, 6]
    assert [int(half["attention_mask"].sum()) for half in halves] == [12, 8]
    expected = backward(model, whole)
    found = backward(model, *halves, num_items_in_batch=torch.tensor(15))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_global_batch_loss_reads_the_load_of_the_step_so_far_and_begins_anew_with_each():
    model, made = adopted("deepseek_v3", {"global-batch": 1.0})
    parts, heard, seen = uneven(made), Losses(model), []
    with hf.global_batch(model) as batch, listening(heard), hf.observe(model, seen.append):
        for _ in range(2):
            found = []
            for part in parts:
                model(**part).loss.backward()
                found.append({layer: float(losses["global-batch"]) for layer, losses in heard.by_layer.items()})
            batch.step()
    for layer in hf.moe_layers(model):
        first, second = [one.routing for one in seen if one.layer == layer][:2]
        for routing, load_E, losses in (
            (first, first.load_E, found[0]),
            (second, first.load_E + second.load_E, found[1]),
        ):
            mean_E = routing.probability_TE[routing.valid_T].double().mean(dim=0)
            assert losses[layer] == pytest.approx(8 * float((load_E / load_E.sum() * mean_E).sum()), rel=1e-5)


# --- recomputed activations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "ernie4_5_vl_moe", "deepseek_v4", "phimoe"])
def test_gradients_routes_and_reports_are_those_without_checkpointing(family):
    model, made = adopted(family)
    parts, routes, seen = uneven(made), [], []
    expected = backward(model, *parts)
    for layer in hf.moe_layers(model).values():
        layer.reporter.register_forward_hook(lambda module, _args, output: routes.append((module, choice_of(output))))
    recompute(model)
    assert recomputes(model)
    with set_checkpoint_early_stop(False), hf.observe(model, seen.append):
        actual = backward(model, *parts)
    torch.testing.assert_close(actual, expected, **EXACT)
    layers = len(hf.moe_layers(model))
    assert [one.index for one in seen] == [*range(layers)] * 2
    assert len(routes) == 4 * layers  # each forward, and each again in backward
    for forward in (0, 2 * layers):
        first, again = (dict(routes[start : start + layers]) for start in (forward, forward + layers))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[module], again[module]) for module in first)


def choice_of(output) -> Tensor:
    """What tells a choice: the experts of a router, or what a block made of them."""
    if isinstance(output, Tensor):
        return output.detach()
    return output[2] if len(output) > 2 else output[0].detach()


def test_the_noise_of_a_router_is_the_same_when_recomputed():
    model, made = adopted("mixtral", router_jitter_noise=0.3)
    expected, again = backward(model, labelled(made)), backward(model, labelled(made), labelled(made))
    assert not torch.equal(again["lm_head.weight"], 2 * expected["lm_head.weight"])
    recompute(model)
    torch.testing.assert_close(backward(model, labelled(made)), expected, **EXACT)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoder_and_decoder_are_each_balanced_over_their_own_tokens(checkpointing):
    model, made = adopted("switch_transformers", {"switch": 0.5, "z": 0.1}, dropout_rate=0.0, router_jitter_noise=0.0)
    inputs = {**made.inputs, "labels": made.inputs["decoder_input_ids"]}
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    inputs["decoder_attention_mask"][0, -3:] = 0
    expected, seen, heard = backward(model, inputs), [], Losses(model)
    if checkpointing:
        recompute(model)
    with hf.observe(model, seen.append), listening(heard):
        found = backward(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert [int(one.routing.valid_T.sum()) for one in seen] == [12, 12, 11, 11]
    total = sum(0.5 * float(one["switch"]) + 0.1 * float(one["z"]) for one in heard.by_layer.values())
    assert float(model(**inputs).loss.detach()) == pytest.approx(own_loss(model, inputs) + total, rel=1e-5)


@torch.no_grad()
def own_loss(model, inputs) -> float:
    return float(model(**inputs).loss)


def test_experts_that_are_modules_of_their_own_have_zero_gradients_where_no_token_came():
    model, made = adopted("switch_transformers", {"switch": 0.5})
    inputs = {name: value[:1, :2] for name, value in made.inputs.items()}
    model(**inputs, labels=inputs["decoder_input_ids"]).loss.backward()
    experts = {name: weight.grad for name, weight in model.named_parameters() if ".experts." in name}
    assert all(gradient is not None for gradient in experts.values())
    assert any(not gradient.any() for gradient in experts.values())


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_reentrant_checkpointing_is_refused_after_adoption_and_before(family):
    model, _ = adopted(family)
    with pytest.raises(ConfigError) as error:
        recompute(model, {"use_reentrant": True})
    assert str(error.value) == REENTRANT
    plain = tiny(family).model
    recompute(plain, {"use_reentrant": True})
    with pytest.raises(ConfigError) as error:
        mz.adopt(plain)
    assert str(error.value) == REENTRANT
    assert not hf.is_sparse(plain)


# --- transformers' Trainer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4", "dbrx", "jamba"])
def test_trainer_takes_the_step_that_a_loop_would(family, checkpointing, tmp_path):
    model, made = adopted(family, {"switch": 1.0, "z": 0.1})
    parts = uneven(made)
    counts = [predicted(part) for part in parts]
    for part, count in zip(parts, counts, strict=True):
        (model(**part).loss * count / sum(counts)).backward()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    expected = {name: before[name] - gradient for name, gradient in gradients(model).items()}
    model.zero_grad()
    args = arguments(tmp_path, gradient_accumulation_steps=2, **{f"{CHECKPOINTING}_checkpointing": checkpointing})
    seen: list[hf.Seen] = []
    trainer = Trainer(model, args, train_dataset=Rows(parts))
    with hf.observe(model, seen.append):
        trainer.train()
    assert trainer.model_accepts_loss_kwargs
    assert len(seen) == 2 * len(hf.moe_layers(model))
    trained = {name: weight.detach() for name, weight in model.named_parameters() if name in expected}
    torch.testing.assert_close(trained, expected, atol=1e-6, rtol=1e-5)


def test_trainer_evaluates_without_balance_losses(tmp_path):
    model, made = adopted("qwen3_moe")
    part = labelled(made)
    with torch.no_grad():
        expected = float(model.eval()(**part).loss)
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=Rows([part]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
