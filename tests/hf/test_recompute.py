"""Activations that are recomputed in backward route as they did, and count nothing twice."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moesaic import ConfigError
from moesaic.hf import balance, observe, sparsify
from tests.hf.test_forward import padded, sparse
from tests.hf.tiny import CLASSIC, FAMILIES, OPTIONS, batch, build, gradients, recompute, recompute_nothing, recomputes

EXACT = {"rtol": 0, "atol": 0}


def a_batch(family):
    return batch(family) if family in ("vit", "t5") else padded(batch(family), "left")


def backward(model, *batches):
    """The gradients of all forwards first, then all backwards."""
    model.zero_grad()
    losses = [model(**inputs).loss for inputs in batches]
    for loss in losses:
        loss.backward()
    return gradients(model)


@pytest.mark.parametrize("recipe", CLASSIC)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_checkpointing(family, recipe):
    model, inputs = sparse(family, recipe).train(), a_batch(family)
    expected = backward(model, inputs)
    recompute(model)
    assert recomputes(model)
    seen = []
    with observe(model, seen.append):
        actual = backward(model, inputs)
    # T5 runs without its cache when checkpointed, and adds in another order then.
    torch.testing.assert_close(actual, expected, **({"rtol": 1e-5, "atol": 1e-6} if family == "t5" else EXACT))
    assert [one.index for one in seen] == list(range(len(seen)))


def test_a_recomputation_that_runs_to_its_end_counts_nothing_twice():
    model, inputs, seen = sparse("llama").train(), a_batch("llama"), []
    expected = backward(model, inputs)
    recompute(model)
    with set_checkpoint_early_stop(False), observe(model, seen.append), balance(model) as terms:
        actual = backward(model, inputs)
    torch.testing.assert_close(actual, expected, **EXACT)
    assert [one.index for one in seen] == [0, 1]
    torch.testing.assert_close(terms.total, 2 * 2e-3 * terms.means["switch"])


def test_two_forwards_before_two_backwards_each_recompute_under_their_own_mask():
    model = sparse("llama", "switch").train()
    left, right = padded(batch("llama"), "left"), padded(batch("llama", positions=9), "right", 2)
    expected = backward(model, left, right)
    recompute(model)
    torch.testing.assert_close(backward(model, left, right), expected, **EXACT)
    assert torch.equal(backward(model, right, left)["lm_head.weight"], expected["lm_head.weight"])


def test_the_noise_of_a_router_is_the_same_when_recomputed():
    model = sparsify(build("llama"), "switch", **OPTIONS["switch"] | {"jitter": 0.3}).train()
    inputs = a_batch("llama")
    torch.manual_seed(1)
    expected = backward(model, inputs)
    recompute(model)
    torch.manual_seed(1)
    torch.testing.assert_close(backward(model, inputs), expected, **EXACT)


def test_a_recomputed_forward_may_outlive_those_who_listened_to_it():
    model, inputs = sparse("llama").train(), a_batch("llama")
    expected = backward(model, inputs)
    recompute(model)
    model.zero_grad()
    with balance(model) as terms:
        loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(gradients(model), expected, **EXACT)
    assert float(terms.means["switch"]) > 0


def test_balance_in_evaluation_and_checkpointing_go_together():
    model, inputs = sparse("llama"), a_batch("llama")
    recompute(model)
    with balance(model) as terms:
        model(**inputs)
    terms.total.backward()
    assert model.model.layers[0].mlp.moe.router.weight.grad.abs().sum() > 0


def test_checkpointing_that_was_on_before_sparsify_stays_on_and_keeps_the_mask():
    model, inputs = build("llama").train(), a_batch("llama")
    recompute(model)
    sparsify(model, "switch", **OPTIONS["switch"])
    actual = backward(model, inputs)
    recompute_nothing(model)
    torch.testing.assert_close(actual, backward(model, inputs), **EXACT)


def test_a_forward_without_backward_leaves_nothing_behind():
    model, inputs = sparse("llama").train(), a_batch("llama")
    recompute(model)
    with balance(model):
        output = model(**inputs)
    # The balance losses hang on a graph that holds what it needs to recompute: that must not hold them.
    gone = weakref.ref(output.aux_loss)
    del output
    gc.collect()
    assert gone() is None


REENTRANT = (
    "Activation checkpointing of a sparse model needs use_reentrant=False: the reentrant kind cuts the balance losses "
    'off from the router. Pass {"use_reentrant": False} as its keyword arguments, or leave them out.'
)


def test_reentrant_checkpointing_is_refused():
    model = sparse("llama")
    for kwargs in ({"use_reentrant": True}, {}):
        with pytest.raises(ConfigError) as error:
            recompute(model, kwargs)
        assert str(error.value) == REENTRANT
    assert not recomputes(model)


def test_reentrant_checkpointing_from_before_is_refused_and_the_model_is_untouched():
    model = build("llama")
    recompute(model, {"use_reentrant": True})
    with pytest.raises(ConfigError) as error:
        sparsify(model, "mixtral", **OPTIONS["mixtral"])
    assert str(error.value) == REENTRANT
    assert type(model).__name__ == "LlamaForCausalLM"
    assert "moe" not in " ".join(model.state_dict())


def test_a_wrapper_that_loses_the_frame_is_refused_in_backward():
    model, inputs = sparse("llama").train(), a_batch("llama")
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    loss = model(**inputs, use_cache=False).loss
    with pytest.raises(ConfigError) as error:
        loss.backward()
    assert str(error.value) == (
        "A MoE layer is recomputed during backward by a checkpoint wrapper that Moesaic does not know, so it cannot "
        "tell padding from tokens and would route otherwise than in the forward. Remove the wrapper and call "
        "model.activation_checkpointing_enable() (gradient_checkpointing_enable() in older transformers)."
    )


def test_a_whole_forward_under_a_checkpoint_is_seen_once():
    model, inputs, seen = sparse("llama").train(), a_batch("llama"), []
    expected = backward(model, inputs)
    model.zero_grad()
    with observe(model, seen.append):
        checkpoint(lambda: model(**inputs, use_cache=False).loss, use_reentrant=False).backward()
    torch.testing.assert_close(gradients(model), expected, **EXACT)
    assert len(seen) == 2
