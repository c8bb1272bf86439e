"""What a checkpoint holds is known before it is read, and whatever is wrong with it is said then."""

import json
import re

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2Model, MixtralConfig, MixtralForCausalLM

import moesaic as mz
from moesaic.convert.checkpoint.source import MemorySource, joined, open_source
from moesaic.core.errors import CheckpointError, ConfigError
from tests.hf.tiny import build

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SIZES)).eval()


def tensors_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def write(folder, tensors):
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_shows_the_names_that_its_model_has_in_memory_and_gives_its_tensors(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in tensors_of(tmp_path)

    source = open_source(tmp_path)
    state = model.state_dict()
    assert {name: info.shape for name, info in source.names.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in state.items())
    assert source.num_stored == len(tensors_of(tmp_path)) > len(state)


def test_a_folder_saved_as_it_is_in_memory_reads_the_same(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_of(tmp_path)
    source = open_source(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in model.state_dict().items())


def test_a_folder_of_many_files_is_read_through_its_index(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    source = open_source(tmp_path)
    assert source.shard_bytes == max(file.stat().st_size for file in files)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in model.state_dict().items())


def test_tied_weights_have_one_name_whichever_of_them_a_folder_holds(tmp_path):
    model = build("qwen3")
    model.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    assert "lm_head.weight" not in tensors
    assert "lm_head.weight" not in open_source(tmp_path).names

    embedding = tensors["model.embed_tokens.weight"]
    write(tmp_path, tensors | {"lm_head.weight": embedding.clone()})
    source = open_source(tmp_path)
    assert source.dropped == {"lm_head.weight": "tied to model.embed_tokens.weight"}

    only_head = {name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}
    write(tmp_path, only_head | {"lm_head.weight": embedding})
    source = open_source(tmp_path)
    assert torch.equal(source.read("model.embed_tokens.weight"), embedding)

    write(tmp_path, tensors | {"lm_head.weight": embedding + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        open_source(tmp_path)


def test_a_folder_without_its_head_s_prefix_gets_it(tmp_path):
    """As GPT-2 was published."""
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tmp_path).items()}
    assert "h.0.attn.c_attn.weight" in tensors
    write(tmp_path, tensors)
    source = open_source(tmp_path)
    assert set(source.names) == set(MemorySource(model).names)


def test_tensors_that_the_class_passes_over_are_dropped_with_the_reason(tmp_path):
    model = build("t5")
    model.save_pretrained(tmp_path)
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    write(tmp_path, tensors_of(tmp_path) | {name: torch.zeros(32, 2)})
    source = open_source(tmp_path)
    assert source.dropped == {name: "the model's class does not read it"}
    assert name not in source.names


def test_a_model_in_memory_is_left_as_it_is():
    model = mixtral()
    config = model.config.to_dict()
    source = open_source(model)
    assert model.config.to_dict() == config
    assert source.config.architectures == ["MixtralForCausalLM"]
    assert torch.equal(source.read("lm_head.weight"), model.lm_head.weight)


def test_a_sparse_model_of_ours_keeps_its_names(tmp_path):
    model = mz.sparsify(build("llama"), "deepseek-v3", num_experts=4, top_k=2)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert source.names["model.layers.1.mlp.moe.experts.gate_EDF"].shape == (4, 16, 24)
    assert source.names["model.layers.1.mlp.moe.router.bias_E"].dtype == torch.float32


def test_the_second_of_joined_sources_has_a_prefix():
    first, second = build("llama"), build("llama")
    both = joined([open_source(first), open_source(second)])
    assert torch.equal(both.read("model.norm.weight"), first.model.norm.weight)
    assert torch.equal(both.read("1:lm_head.weight"), second.lm_head.weight)
    assert len(both.names) == 2 * len(open_source(first).names)


def test_what_is_no_folder_and_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="starts from a folder or a transformers model, got Linear"):
        open_source(torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="There is no folder"):
        open_source(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"neither config\.json nor run\.json"):
        open_source(tmp_path)


def test_a_pickle_is_not_read_but_named(tmp_path):
    build("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"must hold the weights as safetensors.*pytorch_model\.bin"):
        open_source(tmp_path)


def test_a_file_cut_short_is_named(tmp_path):
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged, cut short or missing"):
        open_source(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="4KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    first, second = sorted(set(values["weight_map"].values()))[:2]
    name = next(name for name, file in values["weight_map"].items() if file == first)
    values["weight_map"][name] = second
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"differ in 1 tensors, the first is {re.escape(name)}: in {second}"):
        open_source(tmp_path)
    (tmp_path / second).unlink()
    with pytest.raises(CheckpointError, match="damaged, cut short or missing"):
        open_source(tmp_path)


def test_experts_that_do_not_fit_each_other_are_named(tmp_path):
    mixtral().save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    write(tmp_path, tensors | {name: torch.zeros(23, 16)})
    with pytest.raises(CheckpointError, match=r"for model\.layers\.1\.mlp\.experts\.gate_up_proj.*do not fit"):
        open_source(tmp_path)


def test_a_quantized_model_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds a quantized model"):
        open_source(tmp_path)


def test_a_config_that_cannot_be_read_or_names_no_class_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(CheckpointError, match=r"No class .* architectures=\['NoSuchModel'\]"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        open_source(tmp_path)


def test_a_model_without_a_head_is_read_as_such(tmp_path):
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61)).save_pretrained(tmp_path)
    assert "h.0.attn.c_attn.weight" in open_source(tmp_path).names
