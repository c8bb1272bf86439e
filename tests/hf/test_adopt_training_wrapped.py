"""An adopted model copied, saved, loaded, wrapped, run in threads or fed with embeddings trains as it did."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import moesaic as mz
from moesaic import hf
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.test_adopt_training_losses import labelled
from tests.hf.tiny import gradients

pytestmark = written_for_this_transformers

EXACT = {"rtol": 0, "atol": 0}
FAMILIES = ("mixtral", "deepseek_v3", "ernie4_5_moe", "zaya", "dbrx", "llama4", "jetmoe", "gemma4")
BALANCE = {"switch": 0.5, "z": 0.1}


def adopted(family, **changes):
    made = tiny(family, **changes)
    return mz.adopt(made.model, balance=BALANCE).train(), labelled(made)


def backward(model, inputs):
    """The loss and every gradient of one forward."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_trains_as_the_original_and_apart_from_it(family):
    model, inputs = adopted(family)
    expected = backward(model, inputs)
    other = copy.deepcopy(model)
    torch.testing.assert_close(backward(other, inputs), expected, **EXACT)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.5)
    mz.adopt(other, balance=None)
    torch.testing.assert_close(backward(model, inputs), expected, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_from_adopted_to_plain_and_back(family, tmp_path):
    model, inputs = adopted(family)
    expected = backward(model, inputs)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    plain = tiny(family, seed=1).model.train()
    assert set(plain.state_dict()) == set(weights)
    plain.load_state_dict(weights)
    with torch.no_grad():
        own = model(**inputs).loss
        torch.testing.assert_close(plain(**inputs).loss, own, rtol=1e-5, atol=1e-6)
    again, _ = adopted(family, seed=1)
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(backward(again, inputs), expected, **EXACT)


class WithValues(nn.Module):
    """What reinforcement learning puts around a model: its outputs, and a number for each token."""

    def __init__(self, model) -> None:
        super().__init__()
        self.inner = model
        self.head = nn.Linear(model.get_decoder().config.hidden_size, 1)

    def forward(self, **inputs):
        output = self.inner(**inputs, output_hidden_states=True)
        return output, self.head(output.hidden_states[-1])


@pytest.mark.parametrize("around", ["adopted inside", "adopted around"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "dbrx", "gemma4"])
def test_a_wrapper_around_an_adopted_model_sees_its_losses_and_routes(family, around):
    model, inputs = adopted(family)
    expected, layers = model(**inputs), list(hf.moe_layers(model))
    if around == "adopted inside":
        wrapper = WithValues(model)
    else:
        wrapper = mz.adopt(WithValues(tiny(family).model), balance=BALANCE).train()
    seen: list[hf.Seen] = []
    with hf.observe(wrapper, seen.append), mz.record(wrapper) as trace, hf.balance(wrapper) as terms:
        output, value_BP1 = wrapper(**inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.aux_loss, terms.total)
    assert [one.layer for one in seen] == [f"inner.{layer}" for layer in layers] == list(trace.metadata.layer_names)
    (value_BP1.sum() + output.aux_loss).backward()
    assert wrapper.head.weight.grad.any()


def test_a_model_with_two_adopted_models_inside_counts_each_once():
    policy, inputs = adopted("mixtral")
    reference, _ = adopted("deepseek_v3")
    alone = float(policy(**inputs).aux_loss.detach()), float(reference(**inputs).aux_loss.detach())

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.reference = policy, reference.eval()

        def forward(self, **inputs):
            with torch.no_grad():
                self.reference(**inputs)
            return self.policy(**inputs)

    pair, seen = Pair(), []
    with hf.observe(pair, seen.append), hf.balance(pair) as terms:
        output = pair(**inputs)
    assert [(one.layer.partition(".")[0], one.training) for one in seen] == [("reference", False)] * 2 + [
        ("policy", True)
    ] * 3
    assert float(output.aux_loss.detach()) == pytest.approx(alone[0])
    # Whoever asks for the balance gets that of what is not trained too.
    assert float(terms.total.detach()) == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "ernie4_5_moe", "zaya", "dbrx", "llama4", "jetmoe"])
def test_embeddings_in_place_of_ids_give_the_same_losses_with_padding_out(family):
    model, inputs = adopted(family)
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with mz.record(model) as trace:
        output = model(inputs_embeds=embeds, **inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    assert (trace.token_id == -1).all()
    assert trace.num_tokens == 12


def test_models_in_two_threads_do_not_meet():
    jobs = {family: adopted(family) for family in ("mixtral", "deepseek_v3")}
    expected = {family: backward(*job) for family, job in jobs.items()}
    found, seen, failed = {}, {family: [] for family in jobs}, []
    start = threading.Barrier(2)

    def work(family: str) -> None:
        model, inputs = jobs[family]
        try:
            with hf.observe(model, seen[family].append):
                start.wait()
                for _ in range(5):
                    found[family] = backward(model, inputs)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(family,)) for family in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for family in jobs:
        torch.testing.assert_close(found[family], expected[family], **EXACT)
    assert {family: len(heard) for family, heard in seen.items()} == {"mixtral": 15, "deepseek_v3": 10}


def test_one_model_in_two_threads_keeps_their_masks_apart():
    model, inputs = adopted("mixtral")
    short = {name: value[:, :4] for name, value in inputs.items()}
    expected = [float(model(**one).aux_loss.detach()) for one in (inputs, short)]
    found: dict[int, set[float]] = {0: set(), 1: set()}

    def work(which: int, one) -> None:
        for _ in range(10):
            found[which].add(float(model(**one).aux_loss.detach()))

    threads = [threading.Thread(target=work, args=job) for job in enumerate((inputs, short))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: {expected[0]}, 1: {expected[1]}}
