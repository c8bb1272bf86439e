from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersModel,
)

from moesaic import ConfigError, recipes
from moesaic.hf import moe_layers, sparsify
from moesaic.hf.find import choose, find_feed_forwards
from tests.hf.tiny import OPTIONS, batch, build

PATHS = {
    "llama": ["layers.0.mlp", "layers.1.mlp"],
    "qwen3": ["layers.0.mlp", "layers.1.mlp"],
    "gpt2": ["h.0.mlp", "h.1.mlp"],
    "jamba": ["layers.0.feed_forward", "layers.1.feed_forward"],
    "lstm": ["layers.0.feed_forward", "layers.1.feed_forward"],
    "t5": [
        "encoder.block.0.layer.1.DenseReluDense",
        "encoder.block.1.layer.1.DenseReluDense",
        "decoder.block.0.layer.2.DenseReluDense",
        "decoder.block.1.layer.2.DenseReluDense",
    ],
    "vit": ["layers.0.mlp", "layers.1.mlp"],
}


@pytest.mark.parametrize("family", PATHS)
def test_each_family_is_found_by_its_structure(family):
    found = find_feed_forwards(build(family).base_model)
    assert [one.path for one in found] == PATHS[family]
    assert {(one.width, one.hidden) for one in found} == {(16, 24)}


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_t5_is_found_with_and_without_a_gate(projection):
    assert len(find_feed_forwards(build("t5", feed_forward_proj=projection).base_model)) == 4


def test_a_gate_and_an_up_projection_in_one_map_are_seen_as_two():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(vocab_size=61, pad_token_id=0, **sizes))
    assert [(one.width, one.hidden) for one in find_feed_forwards(model.base_model)] == [(16, 24)]


def test_a_network_as_wide_inside_as_outside_is_found():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=61, **sizes))
    assert [(one.width, one.hidden) for one in find_feed_forwards(model.base_model)] == [(16, 16)]


def test_a_narrow_network_is_not_read_backwards():
    assert {(one.width, one.hidden) for one in find_feed_forwards(build("gpt2", n_inner=8).base_model)} == {(16, 8)}


def test_a_model_whose_network_is_split_over_modules_is_refused_with_what_was_found():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=61, **sizes))
    with pytest.raises(ConfigError) as error:
        sparsify(model, "mixtral")
    assert str(error.value) == (
        "No feed-forward network was found in BertModel: what is needed is a module of its own that maps D to F and F "
        "back to D, inside a repeated block with attention. The repeated blocks found are: encoder.layer (2 BertLayer, "
        "each with attention.self.query 16 -> 16, attention.self.key 16 -> 16, attention.self.value 16 -> 16, "
        "attention.output.dense 16 -> 16, intermediate.dense 16 -> 24, output.dense 24 -> 16). Use a model whose "
        "feed-forward networks are modules of their own, such as Llama, Qwen3, GPT-2, T5 or ViT."
    )


def test_a_mixture_with_stacked_experts_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=61, num_key_value_heads=1, num_local_experts=2, **sizes))
    with pytest.raises(ConfigError) as error:
        sparsify(model, "mixtral")
    assert str(error.value) == (
        "Each block must have one feed-forward network, but layers.0 has the stacked weight mlp.experts.gate_up_proj: "
        "this model seems to be a mixture already. Start from its dense sibling."
    )


def test_a_mixture_of_separate_experts_is_refused():
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    sparse = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    model = SwitchTransformersModel(SwitchTransformersConfig(vocab_size=61, **sizes, **sparse))
    with pytest.raises(ConfigError) as error:
        sparsify(model, "mixtral")
    experts = "encoder.block.1.layer.1.mlp.experts.expert_"
    assert str(error.value) == (
        f"Each block must have one feed-forward network, but encoder.block.1.layer.1 has {experts}0, {experts}1: "
        "this model seems to be a mixture already. Start from its dense sibling."
    )


def test_every_2_takes_the_second_of_each_pair_and_counts_the_decoder_on():
    found = find_feed_forwards(build("t5", num_layers=3).base_model)
    assert [one.path for one in choose(found, "every-2")] == [
        "encoder.block.1.layer.1.DenseReluDense",
        "decoder.block.0.layer.2.DenseReluDense",
    ]
    assert [one.path for one in choose(found, [4, 0])] == [found[0].path, found[4].path]


@pytest.mark.parametrize("layers", ["every-3", [2], [-1], [0, 0], [], "0", None, [True, 1.0]])
def test_layers_that_are_not_there_are_refused_and_the_model_is_untouched(layers):
    model = build("gpt2")
    with pytest.raises(ConfigError) as error:
        sparsify(model, "mixtral", layers=layers, **OPTIONS["mixtral"])
    assert str(error.value) == (
        f"layers must be 'all', 'every-2' or a list of different indices in 0..1, got {layers!r}. "
        "The model has 2 feed-forward networks, the first is h.0.mlp."
    )
    assert moe_layers(model) == {}
    assert type(model).__name__ == "GPT2LMHeadModel"


def test_a_bad_option_leaves_the_model_as_it_was():
    model, inputs = build("llama"), batch("llama")
    before = model(**inputs).logits
    with pytest.raises(ConfigError, match="top_k must be between 1 and num_experts=4, got 5"):
        sparsify(model, "mixtral", num_experts=4, top_k=5)
    with pytest.raises(ConfigError, match="recipe mixtral has the options"):
        sparsify(model, "mixtral", capacity_factor=2.0)
    assert torch.equal(model(**inputs).logits, before)
    assert model.config.model_type == "llama"


def test_sparsifying_twice_names_the_layers_that_are_there():
    model = sparsify(build("llama"), "mixtral", **OPTIONS["mixtral"])
    with pytest.raises(ConfigError) as error:
        sparsify(model, "mixtral")
    assert str(error.value) == (
        "sparsify needs a dense model, got one with 2 MoE layers already, the first at model.layers.0.mlp. "
        "Sparsify a model once, with all layers you want."
    )


def test_a_recipe_serves_as_well_as_its_name():
    model = sparsify(build("llama"), recipes.get("mixtral"), **OPTIONS["mixtral"])
    assert model.config.moesaic["recipe"] == "mixtral"
    assert len(moe_layers(model)) == 2


def test_a_recipe_that_a_saved_model_could_not_find_again_is_refused():
    own = replace(recipes.get("mixtral"), name="mine")
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama"), own)
    assert str(error.value) == (
        "sparsify needs a recipe that moesaic.recipes.get finds by its name, got one of your own named 'mine'. "
        "Pass a published one with options, or put your layer into the model yourself."
    )


def test_a_module_that_is_no_transformers_model_is_refused():
    with pytest.raises(ConfigError) as error:
        sparsify(nn.Linear(3, 4), "mixtral")
    assert str(error.value) == (
        "sparsify needs a transformers model, got Linear. For your own module, put the layer of "
        "moesaic.recipes.get(name).layer(...) where its feed-forward network is."
    )


def test_an_unknown_balance_loss_is_refused():
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama"), "mixtral", aux_coefficients={"z": 0.1})
    assert str(error.value) == (
        "aux_coefficients must name losses of recipe mixtral (switch), got z. Leave out what the recipe does not have, "
        "or replace its balance with sparsify's balance."
    )


@pytest.mark.parametrize("value", [float("nan"), -0.5, "strong"])
def test_a_coefficient_that_is_no_weight_for_a_loss_is_refused(value):
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama"), "mixtral", aux_coefficients={"switch": value})
    assert str(error.value) == (
        f"The coefficient of balance loss switch must be a finite number of at least 0, got {value!r}. "
        "0 turns the loss off."
    )


def test_an_option_that_json_cannot_hold_is_refused():
    with pytest.raises(ConfigError) as error:
        sparsify(build("llama"), "mixtral", activation=torch.relu)
    assert str(error.value).startswith(
        "Options must be numbers, strings, True, False or None, so that they can be saved with the model, got "
        "activation=<built-in method relu"
    )


def test_the_configuration_that_the_dense_model_was_built_from_stays_dense():
    model = build("llama")
    config = model.config
    sparsify(model, "mixtral", **OPTIONS["mixtral"])
    assert config.model_type == "llama"
    assert not hasattr(config, "moesaic")
    assert model.config.base_model_type == "llama"
    assert model.model.config is model.config


def test_fresh_weights_have_the_spread_that_the_model_draws_with():
    model = sparsify(build("llama", hidden_size=64, intermediate_size=128), "mixtral", num_experts=8)
    weight = model.model.layers[0].mlp.moe.experts.up_EDF
    assert float(weight.detach().std()) == pytest.approx(0.1, rel=0.03)
    given = sparsify(build("llama", hidden_size=64, intermediate_size=128), "mixtral", num_experts=8, init_std=0.01)
    assert float(given.model.layers[0].mlp.moe.router.weight.detach().std()) == pytest.approx(0.01, rel=0.1)


def test_hidden_width_kernel_and_every_2_reach_the_layers():
    model = sparsify(build("llama"), "mixtral", layers="every-2", hidden=12, kernel="reference", num_experts=4)
    layers = moe_layers(model)
    assert list(layers) == ["model.layers.1.mlp"]
    assert layers["model.layers.1.mlp"].experts.up_EDF.shape == (4, 16, 12)
    assert layers["model.layers.1.mlp"].kernel_report().startswith("reference")
    assert "kernel" not in model.config.moesaic["layers"]["layers.1.mlp"]["options"]
