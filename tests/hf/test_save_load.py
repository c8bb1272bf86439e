"""What is saved is what is loaded, to the bit; what does not fit is refused by name."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaModel,
    ViTForImageClassification,
)

from moesaic import CheckpointError, recipes
from moesaic.data.tokenizer import byte_tokenizer
from moesaic.hf import controllers, moe_layers, sparsify
from moesaic.hf.auto import MoesaicConfig
from moesaic.hf.register import register
from tests.hf.test_forward import sparse
from tests.hf.tiny import CLASSIC, FAMILIES, OPTIONS, assert_equal_tensors, batch, build

AUTO = {
    "llama": AutoModelForCausalLM,
    "qwen3": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "jamba": AutoModelForCausalLM,
    "lstm": AutoModelForCausalLM,
    "t5": AutoModelForSeq2SeqLM,
    "vit": AutoModelForImageClassification,
}
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _registered():
    register()


@pytest.fixture
def folder(tmp_path):
    sparse("llama", "deepseek-v3").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("recipe", CLASSIC)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_to_the_bit(family, recipe, tmp_path):
    model, inputs = sparse(family, recipe), batch(family)
    for steered in controllers(model):
        steered.controller.step(torch.tensor([5, 1, 0, 2] * len(steered.layers)))
    model.save_pretrained(tmp_path)
    loaded = AUTO[family].from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert_equal_tensors(model.state_dict(), loaded.state_dict())
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    assert loaded.config.moesaic == model.config.moesaic
    loaded.train()
    torch.testing.assert_close(loaded(**inputs).aux_loss, model.train()(**inputs).aux_loss)


def test_keys_read_as_where_the_network_stood(folder):
    keys = [key for key in load_file(folder / WEIGHTS) if ".mlp." in key]
    assert keys[:6] == [
        f"model.layers.0.mlp.moe.{name}"
        for name in (
            "experts.down_EFD",
            "experts.gate_EDF",
            "experts.up_EDF",
            "router.bias_E",
            "router.weight",
            "shared.down_FD",
        )
    ]


def test_a_second_save_is_the_first_to_the_byte(folder, tmp_path):
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(again)
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


def test_every_2_aux_coefficients_and_widths_come_back(tmp_path):
    model = sparsify(
        build("llama"), "mixtral", layers="every-2", hidden=12, num_experts=4, aux_coefficients={"switch": 0.5}
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(moe_layers(loaded)) == ["model.layers.1.mlp"]
    assert loaded.model.layers[1].mlp.terms[0].coefficient == 0.5


def test_shards_come_back(tmp_path):
    model = sparse("llama", "mixtral")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal_tensors(model.state_dict(), AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())


def test_bfloat16_leaves_the_selection_bias_in_float32(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert dtypes.pop("model.layers.0.mlp.moe.router.bias_E") == torch.float32
    assert dtypes.pop("model.layers.1.mlp.moe.router.bias_E") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert loaded(**batch("llama")).logits.dtype == torch.bfloat16


def test_a_bfloat16_model_gets_bfloat16_layers_and_a_float32_bias():
    model = sparsify(build("llama").to(torch.bfloat16), "deepseek-v3", **OPTIONS["deepseek-v3"])
    dtypes = {str(tensor.dtype) for name, tensor in model.state_dict().items() if "bias_E" not in name}
    assert dtypes == {"torch.bfloat16"}
    assert moe_layers(model)["model.layers.0.mlp"].router.bias_E.dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "t5"])
def test_tied_embeddings_stay_tied(family, tmp_path):
    model = sparse(family)
    model.save_pretrained(tmp_path)
    loaded = AUTO[family].from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_dense_folder_whose_names_are_translated_on_loading_is_saved_under_its_own(tmp_path):
    # transformers renames ViT's tensors when it reads them, and back when it writes them.
    build("vit").save_pretrained(tmp_path / "dense")
    dense = ViTForImageClassification.from_pretrained(tmp_path / "dense")
    model = sparsify(dense, "mixtral", **OPTIONS["mixtral"])
    model.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "sparse")
    assert_equal_tensors(model.state_dict(), loaded.state_dict())


def test_the_body_and_another_head_can_be_read_from_a_folder(folder):
    whole = AutoModelForCausalLM.from_pretrained(folder)
    body = AutoModel.from_pretrained(folder)
    assert isinstance(body, LlamaModel)
    assert_equal_tensors(whole.model.state_dict(), body.state_dict())
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert_equal_tensors(whole.model.state_dict(), classifier.model.state_dict())
    assert classifier.score.weight.shape == (5, 16)


def test_a_body_that_was_saved_alone_comes_back(tmp_path):
    model = sparse("llama")
    model.model.save_pretrained(tmp_path)
    assert_equal_tensors(model.model.state_dict(), AutoModel.from_pretrained(tmp_path).state_dict())


def test_a_fresh_model_from_a_configuration_draws_its_layers():
    config = sparse("llama", "deepseek-v3").config
    fresh = AutoModelForCausalLM.from_config(config)
    layer = moe_layers(fresh)["model.layers.0.mlp"]
    assert float(layer.experts.up_EDF.detach().std()) == pytest.approx(0.1, rel=0.1)
    assert not layer.router.bias_E.any()


def test_transformers_does_not_draw_the_layers_again():
    model = sparse("llama", "deepseek-v3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".moe." in name}
    model.init_weights()
    assert_equal_tensors(before, {name: tensor for name, tensor in model.state_dict().items() if ".moe." in name})


def test_a_tokenizer_beside_the_model_is_found(folder):
    byte_tokenizer().save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == [97, 98, 99]


def test_an_output_can_be_taken_apart_and_rebuilt_with_its_balance_losses():
    # Mixed precision and sharded training do so.
    output = sparse("llama").train()(**batch("llama"))
    rebuilt = pytree.tree_map(lambda leaf: leaf, output)
    assert type(rebuilt) is type(output)
    assert rebuilt.aux_loss is output.aux_loss


BOTH_WAYS = """
import {first}
import {second}
from transformers import AutoModelForCausalLM
import torch
for folder in {folders!r}:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    print(type(model).__name__, float(model(torch.randint(3, 61, (2, 7))).logits.detach().double().sum()))
"""


@pytest.mark.parametrize(("first", "second"), [("moesaic", "transformers"), ("transformers.models.auto", "moesaic")])
def test_a_fresh_process_needs_only_to_import_moesaic(first, second, tmp_path):
    """A model of ours, and the LSTM, which transformers does not have: dense and sparse."""
    models = {"ours": sparse("llama", "deepseek-v3"), "dense": build("lstm"), "sparse": sparse("lstm")}
    expected = []
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        torch.manual_seed(0)
        total = float(model(torch.randint(3, 61, (2, 7))).logits.detach().double().sum())
        expected.append([type(model).__name__, pytest.approx(total, rel=1e-6)])
    code = BOTH_WAYS.format(first=first, second=second, folders=[str(tmp_path / name) for name in models])
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [[name, float(total)] for name, total in map(str.split, done.stdout.splitlines())] == expected


def test_registering_twice_is_once():
    before = list(sys.meta_path)
    register()
    assert sys.meta_path == before
    assert AutoConfig.for_model("moesaic").__class__ is MoesaicConfig


def test_a_copy_is_independent_and_equal():
    model, inputs = sparse("t5", "deepseek-v3"), batch("t5")
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert twin.config is not model.config
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    with torch.no_grad():
        twin.encoder.block[0].layer[1].DenseReluDense.moe.router.weight.zero_()
    assert not torch.equal(twin(**inputs).logits, model(**inputs).logits)


def test_model_and_configuration_can_be_pickled():
    model, inputs = sparse("llama"), batch("llama")
    config = pickle.loads(pickle.dumps(model.config))
    assert type(config) is type(model.config)
    assert config.to_dict() == model.config.to_dict()
    assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, model(**inputs).logits)


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder):
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    return str(error.value)


def test_missing_left_over_and_misshapen_tensors_are_named(folder):
    def change(tensors):
        del tensors["model.layers.0.mlp.moe.experts.up_EDF"]
        tensors["model.layers.7.mlp.moe.experts.up_EDF"] = torch.zeros(2)
        tensors["model.layers.1.mlp.moe.router.weight"] = torch.zeros(5, 16)

    rewrite(folder, change)
    assert refusal(folder) == (
        f"The weights in {folder} must be those that its config.json describes, but missing are "
        "model.layers.0.mlp.moe.experts.up_EDF; left over are model.layers.7.mlp.moe.experts.up_EDF; of another shape "
        "are model.layers.1.mlp.moe.router.weight (saved (5, 16), built (4, 16)). "
        "Copy the folder again from where it was saved."
    )


def test_many_missing_tensors_are_counted(folder):
    rewrite(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1.mlp" in key])
    layer = "model.layers.1.mlp.moe"
    assert refusal(folder) == (
        f"The weights in {folder} must be those that its config.json describes, but missing are "
        f"{layer}.experts.down_EFD, {layer}.experts.gate_EDF, {layer}.experts.up_EDF, {layer}.router.bias_E, "
        f"{layer}.router.weight and 3 more. Copy the folder again from where it was saved."
    )


def test_an_expert_that_is_missing_below_another_head_is_named_too(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.moe.experts.up_EDF"))
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.moe\.experts\.up_EDF"):
            auto_class.from_pretrained(folder)


def test_a_head_of_another_size_may_be_asked_for(tmp_path):
    sparse("vit").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"of another shape are classifier\.bias \(saved \(3,\), built \(9,\)\)"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=9)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (9, 16)


def test_weights_that_are_cut_short_are_refused(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    assert refusal(folder).startswith(f"The weights in {folder} are damaged, cut short or incomplete (")


def test_a_shard_that_is_missing_is_refused(tmp_path):
    sparse("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert refusal(tmp_path) == (
        f"The weights in {tmp_path} are damaged, cut short or incomplete (No such file or directory: {shard}). "
        "Copy the folder again from where it was saved, or go back to an earlier checkpoint."
    )


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert refusal(folder) == (
        f"{folder} must hold the weights as safetensors, got config.json, generation_config.json, pytorch_model.bin. "
        "Save the model again with save_pretrained."
    )
    with pytest.raises(CheckpointError) as error:
        AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert str(error.value) == (
        "Sparse models are read from safetensors only, got use_safetensors=False: other files can run code when they "
        "are read. Save the model again with save_pretrained."
    )


def reconfigure(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["moesaic"] |= changes.pop("moesaic", {})
    file.write_text(json.dumps({key: value for key, value in (config | changes).items() if value is not None}))


def test_a_folder_of_a_newer_version_is_refused(folder):
    reconfigure(folder, moesaic={"format_version": 7})
    assert refusal(folder) == (
        "This model's config.json has moesaic format version 7, and this Moesaic reads up to 2. Update Moesaic."
    )


def test_a_folder_of_an_unknown_recipe_is_refused(folder):
    reconfigure(folder, moesaic={"recipe": "soup"})
    assert refusal(folder) == (
        "This model's config.json asks for what this Moesaic does not have. recipe must be one of "
        f"{', '.join(recipes.names())}, got 'soup'. List them with `moesaic recipes`."
    )


@pytest.mark.parametrize("damage", [{"layers": None}, {"layers": {"layers.0.mlp": {"width": 16}}}, {"recipe": None}])
def test_a_damaged_description_is_refused(folder, damage):
    reconfigure(folder, moesaic=damage)
    assert refusal(folder).startswith("This model's config.json ")


def test_a_folder_of_an_unknown_dense_model_is_refused(folder):
    reconfigure(folder, base_model_type="llama-11")
    assert refusal(folder) == (
        "This model's config.json names the dense model 'llama-11', which transformers does not have. "
        "Update transformers, or copy the folder again from where it was saved."
    )
