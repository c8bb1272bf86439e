"""What sparsify does for designs that differ by layer, start from the dense network, or look ahead."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel

from moesaic import ConfigError, recipes
from moesaic.hf import moe_layers, observe, sparsify
from moesaic.hf.layers import blocks
from moesaic.hf.register import register
from tests.hf.tiny import OPTIONS, batch, build

ZERO_STARTS = ("shazeer-2017", "hierarchical-2017", "grok-1")
LORA = ("mixlora", "lora-moe", "mole")


def sizes(model):
    return [layer.num_experts for layer in moe_layers(model).values()]


def test_each_layer_may_have_its_own_number_of_experts(tmp_path):
    register()
    model = sparsify(build("llama", num_hidden_layers=3), "mixtral", num_experts=[2, 8, 4], top_k=2)
    assert sizes(model) == [2, 8, 4]
    model.save_pretrained(tmp_path)
    assert sizes(AutoModelForCausalLM.from_pretrained(tmp_path)) == [2, 8, 4]
    model.train()(**batch("llama")).loss.backward()


def test_numbers_of_experts_are_counted():
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama", num_hidden_layers=3), "mixtral", num_experts=[2, 8], top_k=2)
    assert str(error.value) == (
        "num_experts must be one number or one for each of the 3 MoE layers, got 2 numbers. "
        "Give as many as there are layers, in depth order."
    )


def test_a_recipe_that_differs_by_depth_does_so_in_a_model(tmp_path):
    register()
    recipe = recipes.get("pr-moe")
    model = sparsify(build("llama", num_hidden_layers=4), "pr-moe", layers=[0, 1, 3], **OPTIONS["pr-moe"])
    wanted = [recipe.by_depth(recipe.options | OPTIONS["pr-moe"], index, 3)["num_experts"] for index in range(3)]
    assert sizes(model) == wanted
    assert len(set(wanted)) > 1
    model.save_pretrained(tmp_path)
    assert sizes(AutoModelForCausalLM.from_pretrained(tmp_path)) == wanted
    given = sparsify(build("llama"), "pr-moe", num_experts=[5, 6])
    assert sizes(given) == [5, 6]


@pytest.mark.parametrize("recipe", ZERO_STARTS)
def test_gates_that_are_published_to_start_at_0_do_so_in_a_model(recipe):
    """A model's initializer_range is the experts' width."""
    model = sparsify(build("llama", initializer_range=0.3), recipe, **OPTIONS[recipe])
    for layer in moe_layers(model).values():
        assert not any(weight.any() for weight in layer.router.parameters())
        assert float(layer.experts.up_EDF.detach().std()) == pytest.approx(0.3, rel=0.2)
    drawn = sparsify(build("llama"), recipe, **OPTIONS[recipe], gate_init_std=0.4)
    assert all(weight.any() for layer in moe_layers(drawn).values() for weight in layer.router.parameters())


def test_base_starts_in_a_model_as_published_and_loads_in_lower_precision(tmp_path):
    register()
    model = sparsify(build("llama"), "base", **OPTIONS["base"])
    for layer in moe_layers(model).values():
        weight_ED = layer.router.weight.detach()
        torch.testing.assert_close(weight_ED @ weight_ED.T, 0.01 * torch.eye(4), atol=1e-6, rtol=0)
        assert not any(expert.sublayers[0].down.weight.any() for expert in layer.experts)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, saved in zip(moe_layers(loaded).values(), moe_layers(model).values(), strict=True):
        assert torch.equal(layer.router.weight, saved.router.weight.bfloat16())


@pytest.mark.parametrize("recipe", ZERO_STARTS)
def test_a_gate_that_starts_at_0_learns_and_spreads_the_tokens(recipe):
    """Untrained, evaluation breaks every tie the same way; noise, or the balance loss, parts the experts."""
    torch.manual_seed(0)
    model, inputs = sparsify(build("llama"), recipe, **OPTIONS[recipe] | {"num_experts": 8}), batch("llama")

    def busy_and_loss():
        seen = []
        with torch.no_grad(), observe(model.eval(), lambda one: seen.append(one.routing.load_E)):
            loss = float(model(**inputs).loss)
        return [int((load_E > 0).sum()) for load_E in seen], loss

    before, first_loss = busy_and_loss()
    assert max(before) == (4 if recipe == "hierarchical-2017" else 2)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    after, last_loss = busy_and_loss()
    assert min(after) >= 6
    assert last_loss < 0.5 * first_loss


def test_the_gating_residual_hears_the_layer_below_and_trains():
    model = sparsify(build("llama"), "moe++", num_experts=4).train()
    assert all(block.lends_logits for block in blocks(model).values())
    model(**batch("llama")).loss.backward()
    first, second = (layer.router.below_weight.grad.abs().sum() for layer in moe_layers(model).values())
    assert first == 0
    assert second > 0


# --- low-rank experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", LORA)
def test_low_rank_experts_start_as_the_dense_model(recipe):
    dense, inputs = build("llama"), batch("llama")
    with torch.no_grad():
        expected = dense(**inputs).logits
        model = sparsify(dense, recipe, **OPTIONS[recipe])
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert any(not parameter.requires_grad for parameter in moe_layers(model)["model.layers.0.mlp"].parameters())


def test_a_frozen_network_stays_as_it_is_in_training():
    model = sparsify(build("llama"), "mixlora", **OPTIONS["mixlora"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch("llama")).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not [name for name in changed if ".base." in name]
    assert [name for name in changed if "experts.up.out_ERF" in name]


def test_low_rank_experts_need_a_gated_network_without_biases():
    for dense in (build("gpt2"), build("t5"), build("llama", mlp_bias=True)):
        name = type(dense).__name__
        with pytest.raises(ConfigError, match=r"^Low-rank experts start from a gated network without biases, .* got "):
            sparsify(dense, "mixlora", **OPTIONS["mixlora"])
        assert type(dense).__name__ == name


def test_low_rank_experts_have_the_size_and_activation_of_the_network_that_they_change():
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama"), "mixlora", **OPTIONS["mixlora"], hidden=12)
    assert str(error.value) == (
        "Low-rank experts have the hidden size of the network that they change, 24 at layers.0.mlp, got hidden=12. "
        "Leave hidden out."
    )
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama", hidden_act="gelu"), "mixlora", **OPTIONS["mixlora"])
    assert str(error.value) == (
        "Low-rank experts need the activation of the network that they change, GELUActivation at layers.0.mlp, got "
        "silu. Pass the recipe's option activation."
    )
    sparsify(build("llama", hidden_act="gelu"), "mixlora", **OPTIONS["mixlora"], activation="gelu")


# --- looking ahead --------------------------------------------------------------------------------------------------


def test_an_encoder_may_look_ahead_and_a_decoder_is_warned_of():
    recipe, options = "expert-choice", OPTIONS["expert-choice"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sparsify(build("t5"), recipe, layers=[0, 1], **options)
        sparsify(build("vit"), recipe, **options)
        sparsify(LlamaForSequenceClassification(build("llama").config), recipe, **options)
        sparsify(LlamaModel(build("llama").config), recipe, **options)
    new = model.generate(torch.randint(3, 61, (2, 5)), max_new_tokens=3, do_sample=False)
    assert new.shape[0] == 2
    with pytest.warns(UserWarning, match="later tokens") as warned:
        model = sparsify(build("t5"), recipe, **options)
    assert str(warned[0].message) == (
        "In recipe expert-choice a token's experts depend on later tokens of its sequence, in evaluation too. "
        "T5ForConditionalGeneration predicts later tokens: its losses, held-out ones too, see part of the answer and "
        "do not compare with those of other models, and generate is refused. Use the recipe in encoders."
    )
    with pytest.raises(ConfigError, match=r"^generate needs layers in which a token does not depend on later ones"):
        model.generate(torch.randint(3, 61, (2, 5)), max_new_tokens=3)
