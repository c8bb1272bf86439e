"""Training that goes on from a model that is there."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import moesaic as mz
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.data import load_tokenizer
from moesaic.train import TrainConfig, resume, train
from moesaic.train.load import load_trained

from .runs import assert_equal_runs

TINY = {"context": 32, "batch_size": 2, "steps": 2, "eval_tokens": 64, "save_every": 1, "warmup": 0, "lr": 1e-3}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(f"Paragraph {n} tells of the number {n * n}." for n in range(200)))
    return str(path)


def llama(folder, *, sparse=False, dtype=torch.float32, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 256)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, num_key_value_heads=2, **sizes, **ends, **more))
    if sparse:
        mz.sparsify(model, "mixtral", layers=[1], num_experts=4)
    model.to(dtype).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
def test_training_goes_on_from_the_weights_and_the_tokenizer_of_a_folder(sparse, tmp_path, text):
    start = llama(tmp_path / "start", sparse=sparse, dtype=torch.bfloat16)
    kind = "moe" if sparse else "dense"
    summary = train(TrainConfig(out=tmp_path / "run", init=str(start), data=text, **TINY))
    assert list(summary) == [kind]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["kind"] == kind
    trained = load_trained(tmp_path / "run")
    before = load_trained(start).model.float().state_dict()
    after = trained.model.state_dict()
    assert after.keys() == before.keys()
    # Two steps with a learning rate of at most 1e-3 move no number far, and most of them a little.
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    assert 0 < moved.max() < 3e-3
    assert trained.model.dtype == torch.float32
    assert len(trained.tokenizer) == 257


def test_a_run_goes_on_from_the_model_of_another_run(tmp_path, text):
    first = TrainConfig(out=tmp_path / "a", init=str(llama(tmp_path / "start")), data=text, **TINY)
    train(first)
    train(TrainConfig(out=tmp_path / "b", init=str(tmp_path / "a"), data=text, **{**TINY, "lr": 1e-9}))
    one, other = (load_trained(tmp_path / name).model.state_dict() for name in "ab")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-7


def test_a_run_that_was_stopped_resumes_to_the_same_bits(tmp_path, text):
    start = str(llama(tmp_path / "start", sparse=True))
    for name in ("whole", "cut"):
        train(TrainConfig(out=tmp_path / name, init=start, trainable="experts", data=text, **TINY))
    # As if it had been killed after its first step.

    cut = tmp_path / "cut"
    shutil.rmtree(cut / "checkpoints" / "checkpoint-2")
    shutil.rmtree(cut / "model")
    (cut / "summary.json").unlink()
    resume(cut)
    assert_equal_runs(tmp_path / "whole", cut, 2)


def test_only_what_is_named_trainable_is_trained(tmp_path, text):
    start = llama(tmp_path / "start", sparse=True)
    train(TrainConfig(out=tmp_path / "run", init=str(start), trainable=r"layers\.1\.mlp", data=text, **TINY))
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "layers.1.mlp" in name}


def test_a_trainable_that_names_nothing_is_refused_before_anything_is_written(tmp_path, text):
    start = llama(tmp_path / "start")
    with pytest.raises(ConfigError) as error:
        train(TrainConfig(out=tmp_path / "run", init=str(start), trainable="experts", data=text, **TINY))
    assert str(error.value) == (
        "trainable must be found in the name of a parameter that can be trained, got 'experts', which is in none. "
        "They have names such as model.embed_tokens.weight."
    )
    assert not (tmp_path / "run").exists()


def test_a_context_longer_than_the_model_was_made_for_is_refused(tmp_path, text):
    start = llama(tmp_path / "start", max_position_embeddings=16)
    with pytest.raises(ConfigError) as error:
        train(TrainConfig(out=tmp_path / "run", init=str(start), data=text, **TINY))
    assert str(error.value) == f"context must be at most 16 for the model in {start}, got 32. Lower context."


def test_an_encoder_decoder_is_refused(tmp_path, text):
    T5ForConditionalGeneration(T5Config(vocab_size=257, d_model=8, d_ff=8, num_layers=1, num_heads=1)).save_pretrained(
        tmp_path / "t5"
    )
    load_tokenizer("bytes").save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"init must be a model that writes on from its own text, .* encoder-decoder"):
        train(TrainConfig(out=tmp_path / "run", init=str(tmp_path / "t5"), data=text, **TINY))


def test_a_folder_without_a_model_is_refused(tmp_path, text):
    with pytest.raises(CheckpointError, match="There is no folder"):
        train(TrainConfig(out=tmp_path / "run", init=str(tmp_path / "nowhere"), data=text, **TINY))


@pytest.mark.parametrize(("name", "value"), [("width", 64), ("recipe", "olmoe"), ("twin", True), ("tokenizer", "a")])
def test_settings_of_the_model_are_refused_beside_a_model(name, value, tmp_path):
    with pytest.raises(ConfigError) as error:
        TrainConfig(out=tmp_path, init="some/folder", **{name: value})
    assert str(error.value) == (
        f"with init the model is the one in some/folder, got {name}={value!r} too. Leave {name} out, or convert the "
        "model first."
    )


def test_a_trainable_that_is_no_regular_expression_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=re.escape("trainable must be a regular expression, got '('")):
        TrainConfig(out=tmp_path, trainable="(")


def test_settings_come_back_as_they_were(tmp_path):
    config = TrainConfig(out=tmp_path, init=str(llama(tmp_path / "start")), trainable="mlp", context=16)
    assert TrainConfig.from_settings(json.loads(json.dumps(config.settings())), tmp_path) == config
