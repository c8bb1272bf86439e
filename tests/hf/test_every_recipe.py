"""Every recipe, one added tomorrow too, in a small causal language model: trained, saved, loaded, generated from."""

import math
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic import ConfigError, recipes
from moesaic.hf import balance, controllers, domains, moe_layers, observe, record, sparsify
from moesaic.hf.layers import blocks
from moesaic.hf.register import register
from moesaic.telemetry import RoutingSummary
from tests.hf.test_forward import padded
from tests.hf.tiny import OPTIONS, assert_equal_tensors, batch, build, gradients, recompute

every_recipe = pytest.mark.parametrize("recipe", recipes.names())
GENERATED = [name for name in recipes.names() if recipes.get(name).causality != "never"]
REFUSED = [name for name in recipes.names() if recipes.get(name).causality == "never"]


@pytest.fixture(autouse=True)
def _in_a_domain():
    register()
    with domains(1):
        yield


def sparse(recipe, **changes):
    """A tiny Llama; what must be warned of is."""
    with warnings.catch_warnings():
        if recipe in REFUSED:
            warnings.simplefilter("ignore", UserWarning)
        return sparsify(build("llama"), recipe, **OPTIONS[recipe] | changes)


def seeded(model, inputs, **kwargs):
    torch.manual_seed(5)
    return model(**inputs, **kwargs)


@every_recipe
def test_the_loss_is_the_models_own_and_each_balance_loss_by_its_scale(recipe):
    model, inputs, seen = sparse(recipe).train(), batch("llama"), {}
    with observe(model, lambda one: seen.update({one.layer: one.routing})), balance(model) as terms:
        output = seeded(model, inputs)
    with torch.no_grad():
        own = seeded(model, inputs).loss
    by_hand = torch.zeros(())
    for path, block in blocks(model).items():
        for term in block.terms:
            if not term.rewarded:
                by_hand = by_hand + term.scale(seen[path]) * term.loss(seen[path])
    rewarded = any(term.rewarded for block in blocks(model).values() for term in block.terms)
    if recipes.get(recipe).losses:
        torch.testing.assert_close(output.aux_loss, terms.total)
        torch.testing.assert_close(output.loss.detach(), own + output.aux_loss.detach())
        assert set(terms.means) == {term.name for term in recipes.get(recipe).losses}
        if not rewarded:
            torch.testing.assert_close(output.aux_loss.detach(), by_hand.detach(), atol=1e-6, rtol=1e-5)
    else:
        assert "aux_loss" not in output
        torch.testing.assert_close(output.loss.detach(), own)


@every_recipe
def test_a_training_step_gives_every_trained_weight_a_finite_gradient(recipe):
    model = sparse(recipe).train()
    seeded(model, batch("llama")).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())
    assert [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


@every_recipe
def test_a_model_comes_back_to_the_bit(recipe, tmp_path):
    model, inputs = sparse(recipe), batch("llama")
    summaries = {}
    with observe(model.train(), lambda one: summaries.update({one.layer: RoutingSummary.of(one.routing)})):
        seeded(model, inputs)
    for steered in controllers(model):
        steered.step(summaries)
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal_tensors(model.state_dict(), loaded.state_dict())
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    assert loaded.config.moesaic == model.config.moesaic
    frozen = [{name for name, p in one.named_parameters() if not p.requires_grad} for one in (model, loaded)]
    assert frozen[0] == frozen[1]
    torch.testing.assert_close(seeded(loaded.train(), inputs).loss, seeded(model.train(), inputs).loss)


@pytest.mark.parametrize("recipe", GENERATED)
def test_text_is_generated(recipe):
    model, input_ids = sparse(recipe), torch.randint(3, 61, (2, 5))
    new = model.generate(input_ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert new.shape == (2, 9)


@pytest.mark.parametrize("recipe", REFUSED)
def test_where_a_token_sees_later_ones_there_is_a_warning_and_no_generation(recipe):
    with pytest.warns(UserWarning, match="^In recipe .* depend on later tokens .* do not compare"):
        model = sparsify(build("llama"), recipe, **OPTIONS[recipe])
    with pytest.raises(ConfigError) as error:
        model.generate(torch.randint(3, 61, (2, 5)), max_new_tokens=2)
    assert str(error.value) == (
        f"generate needs layers in which a token does not depend on later ones, got recipe {recipe}, in which it does, "
        "in evaluation too. Use a recipe whose causality is 'causal' or 'in evaluation'."
    )


@every_recipe
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_at_the_tokens(recipe, side):
    model, inputs = sparse(recipe), batch("llama")
    more = padded(inputs, side)
    with balance(model) as terms:
        short = model(**inputs).logits
    with balance(model) as more_terms:
        long = model(**more).logits
    real = more["attention_mask"].bool()
    torch.testing.assert_close(long[real], short.flatten(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(more_terms.means, terms.means, atol=1e-5, rtol=1e-5)


@every_recipe
def test_activations_that_are_recomputed_route_as_they_did(recipe):
    model, inputs = sparse(recipe).train(), padded(batch("llama"), "left")
    seeded(model, inputs, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    recompute(model)
    seen = []
    with observe(model, seen.append):
        seeded(model, inputs, use_cache=False).loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=0)
    assert [one.index for one in seen] == [0, 1]


@every_recipe
def test_a_trace_has_the_rows_that_were_seen(recipe):
    model, inputs, seen = sparse(recipe), padded(batch("llama"), "right"), []
    with record(model) as trace, observe(model, seen.append):
        model(**inputs)
    assert trace.num_rows == sum(int(one.routing.valid_N.sum()) for one in seen)
    assert trace.metadata.num_experts == tuple(one.routing.num_experts for one in seen)
    for index, one in enumerate(seen):
        rows_E = torch.bincount(torch.from_numpy(trace.expert[trace.layer == index]), minlength=one.routing.num_experts)
        assert torch.equal(rows_E, one.routing.load_E)
        summary = RoutingSummary.of(one.routing)
        assert 0 <= summary.entropy <= math.log(one.routing.num_experts) + 1e-6
        assert summary.load_max_over_mean >= 1


@every_recipe
def test_numbers_of_parameters_are_of_the_whole_and_of_what_a_token_meets(recipe):
    model = sparse(recipe)
    for layer in moe_layers(model).values():
        assert layer.num_params == sum(parameter.numel() for parameter in layer.parameters())
        assert 0 < layer.num_active_params <= layer.num_params
