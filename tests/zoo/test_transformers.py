"""The zoo against the models that transformers builds: equal to the last weight by part; FLOPs as torch counts them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import moesaic as mz
from moesaic import zoo
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.hf.block import SparseBlock
from moesaic.hf.shape import shape_of, shape_of_config
from moesaic.hf.shape.build import on_meta
from tests.hf.families import ALSO, FAMILIES, tiny, written_for_this_transformers
from tests.zoo.configs import CONFIGS

pytestmark = [written_for_this_transformers, pytest.mark.filterwarnings("ignore::FutureWarning")]

_EXPERTS = re.compile(r"\.(experts|input_linear|output_linear|down_embed|up_embed)\.")
_NOT_OF_TEXT = re.compile(r"shared|attention|vision_tower")
_BIASES = re.compile(r"(correction_bias|expert_bias|balancing_biases)$")
# Those in which every token is multiplied as often as the shape says, and no more: attention without a window,
# experts without a capacity.
COUNTED = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "dbrx",
    "phimoe",
    "minimax",
    "granitemoe",
    "ernie4_5_moe",
    "switch_transformers",
    "jamba",
)


def parameters(model) -> int:
    return sum(one.numel() for one in model.parameters())


def buffers_that_steer(model) -> int:
    """Selection biases, which transformers keeps in buffers and saves with the weights."""
    return sum(one.numel() for name, one in model.named_buffers() if _BIASES.search(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shape_has_as_many_weights_as_the_model_that_transformers_builds_in_every_part(name):
    shape = zoo.get(name)
    model = on_meta(AutoConfig.for_model(**CONFIGS[name]))
    steer = sum(one.num_experts for one in shape.mixtures if one.selection_bias)
    assert shape.num_params - steer == parameters(model)
    assert steer == buffers_that_steer(model)
    built = shape_of(model)
    assert built.params() == shape.params()
    assert built.params(active=True) == shape.params(active=True)
    assert built.flops(4096) == shape.flops(4096)
    if not name.startswith("switch"):
        assert (built.encoder, built.layers) == (shape.encoder, shape.layers)


@pytest.mark.parametrize("name", [*FAMILIES, *ALSO])
def test_every_weight_of_every_family_is_counted_once_and_experts_as_experts(name):
    made = tiny(name)
    shape = shape_of(made.model)
    assert shape.num_params == parameters(made.model) + buffers_that_steer(made.model)
    named = dict(made.model.named_parameters())
    experts = [one.numel() for key, one in named.items() if _EXPERTS.search(key) and not _NOT_OF_TEXT.search(key)]
    assert shape.params().experts == sum(experts) > 0
    # Of dots3_note's four, two see images.
    assert len(shape.mixtures) == {"dots3_note": 2}.get(name, made.num_layers_moe)


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_that_torch_counts(name):
    made = tiny(name)
    made.model.set_attn_implementation("eager")
    if name not in ("dbrx", "switch_transformers"):
        made.model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        made.model(**made.inputs, use_cache=False)
    sequences, context = made.inputs["input_ids"].shape
    counted = sequences * context * shape_of(made.model).flops_per_token(context)
    # torch counts the taps of Jamba's convolution at the places before a sequence too.
    assert counted == counter.get_total_flops() or (
        name == "jamba" and counted == pytest.approx(counter.get_total_flops(), rel=0.01)
    )


def test_backward_is_twice_forward_as_torch_counts_it():
    made = tiny("qwen3_moe")
    made.model.set_attn_implementation("eager")
    made.model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        made.model(**made.inputs, use_cache=False).logits.sum().backward()
    sequences, context = made.inputs["input_ids"].shape
    counted = sequences * context * shape_of(made.model).flops_per_token(context, backward=True)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_folder_and_its_file_give_the_same_shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["mixtral-8x7b"]))
    assert shape_of_config(tmp_path) == shape_of_config(tmp_path / "config.json")
    assert shape_of_config(tmp_path).num_params == 46_702_792_704


def test_a_dense_model_has_a_shape_without_experts():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    shape = shape_of_config(config)
    assert shape.num_params == parameters(on_meta(config)) == shape.num_active_params
    assert not shape.mixtures
    assert shape.layers[0].feeds == (zoo.Dense(hidden=24),)


@pytest.mark.parametrize(
    "recipe", ["switch", "mixtral", "deepseek-v3", "st-moe", "soft-moe", "moe++", "mod", "gpt-oss"]
)
@pytest.mark.filterwarnings("ignore:In recipe soft-moe a token's experts depend on later tokens:UserWarning")
def test_a_model_made_here_is_counted_as_its_own_layers_count_themselves(recipe, tmp_path):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = mz.sparsify(LlamaForCausalLM(config), recipe)
    model.config.save_pretrained(tmp_path)
    shape = shape_of_config(tmp_path)
    idle = sum(
        part.moe.num_params - part.moe.num_active_params for part in model.modules() if isinstance(part, SparseBlock)
    )
    assert shape.num_params == parameters(model)
    assert shape.num_active_params == parameters(model) - idle
    assert bool(shape.mixtures) != (recipe in ("soft-moe", "moe++", "mod"))


def test_a_mixer_that_is_not_known_is_counted_and_said():
    shape = shape_of(tiny("qwen3_next").model)
    assert shape.open.startswith("Of Qwen3NextGatedDeltaNet the zoo knows the weights alone")


def test_a_missing_or_a_broken_or_a_foreign_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="got no such file"):
        shape_of_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(CheckpointError, match="must be JSON"):
        shape_of_config(file)
    file.write_text('{"model_type": "abacus"}')
    with pytest.raises(ConfigError, match="got 'abacus'"):
        shape_of_config(file)


def test_building_on_meta_takes_no_memory_for_weights():
    model = on_meta(AutoConfig.for_model(**CONFIGS["olmoe-1b-7b"]))
    assert {one.device.type for one in model.parameters()} == {"meta"}
    assert torch.get_default_device().type == "cpu"
