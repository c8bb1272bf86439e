"""A conversion uses every tensor once, streams, keeps its word, and leaves all or nothing."""

import errno
import json
import os

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import moesaic as mz
from moesaic.convert import run
from moesaic.convert.checkpoint.shards import ShardWriter
from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.proof.receipt import Receipt
from moesaic.convert.run import convert
from moesaic.convert.steps import Change, Step
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.data import load_tokenizer
from tests.convert.checkpoint.test_source import SIZES, mixtral, tensors_of, write
from tests.hf.families import FAMILIES as FAMILIES_OF_TRANSFORMERS
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.tiny import FAMILIES, build

EVERY = (*FAMILIES, "mixtral", "ours")


def model_of(family):
    if family == "mixtral":
        return mixtral()
    if family == "ours":
        return mz.sparsify(build("llama"), "deepseek-v3", num_experts=4, top_k=2).eval()
    return build(family)


def change(source, *steps, **given):
    return Change(**{"method": "test", "config": source.config, "steps": steps} | given)


def identity(where, out=None, **given):
    source = open_source(where)
    return convert(source, change(source, promises=0.0), out, **given)


def equal(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


@pytest.mark.parametrize("family", EVERY)
def test_doing_nothing_gives_the_same_bits_from_a_folder_and_from_memory(tmp_path, family):
    model = model_of(family)
    model.save_pretrained(tmp_path / "model")
    saved = tensors_of(tmp_path / "model")

    from_folder = identity(tmp_path / "model", tmp_path / "from_folder")
    assert from_folder.model is None
    assert equal(tensors_of(tmp_path / "from_folder"), saved)

    from_memory = identity(model, tmp_path / "from_memory")
    assert equal(tensors_of(tmp_path / "from_memory"), saved)
    assert equal(dict(from_memory.model.state_dict()), dict(model.state_dict()))
    assert type(from_memory.model) is type(model)

    for converted in (from_folder, from_memory):
        receipt = converted.receipt
        assert receipt.largest_logit_difference == 0
        assert receipt.tensors_in == receipt.tensors_out == receipt.kept
        assert receipt.equal_routes == (1 if family in ("mixtral", "ours") else None)
        assert Receipt.load(converted.folder) == receipt


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "ours"])
def test_a_model_in_memory_is_left_alone_and_shares_nothing(family):
    model = model_of(family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = identity(model).model
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    assert equal(dict(model.state_dict()), before)
    assert model.training
    assert not made.training


def test_types_are_kept_and_float32_buffers_stay(tmp_path):
    model = model_of("ours").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    identity(tmp_path / "model", tmp_path / "out")
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "model"))
    types = {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()}
    assert types == {torch.bfloat16, torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert identity(model).model.dtype == torch.bfloat16


def test_files_are_as_large_as_asked_and_hold_neighbours(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "model")
    receipt = identity(tmp_path / "model", tmp_path / "out", shard_bytes=9_000).receipt
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    held = [safetensors.torch.load_file(file) for file in files]
    assert all(sum(t.numel() * 4 for t in one.values()) <= 9_000 for one in held)
    assert equal({name: t for one in held for name, t in one.items()}, tensors_of(tmp_path / "model"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == receipt.size_bytes
    assert len(index["weight_map"]) == receipt.stored_out == receipt.stored_in
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert equal(dict(loaded.state_dict()), dict(model.state_dict()))


def test_a_sharded_source_gives_files_of_its_size(tmp_path):
    mixtral().save_pretrained(tmp_path / "model", max_shard_size="10KB")
    identity(tmp_path / "model", tmp_path / "out")
    largest = max(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) <= largest + 2_000  # headers


def test_one_step_s_tensors_and_one_file_are_in_memory_at_a_time(tmp_path, monkeypatch):
    """Of 12 layers of 8 experts each, never more than one file's worth is waiting to be written."""
    model = MixtralForCausalLM(MixtralConfig(**SIZES | {"num_hidden_layers": 12, "num_local_experts": 8}))
    model.save_pretrained(tmp_path / "model")
    waiting = []
    real = ShardWriter.add

    def seeing(self, name, tensor):
        real(self, name, tensor)
        waiting.append(self._waiting_bytes)

    monkeypatch.setattr(ShardWriter, "add", seeing)
    total = identity(tmp_path / "model", tmp_path / "out", shard_bytes=20_000, probe=None).receipt.size_bytes
    assert max(waiting) <= 20_000 < total / 20


def test_tokenizer_and_generation_settings_go_along_and_nothing_else(tmp_path):
    model = build("llama")
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer("bytes", None)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("free")
    (tmp_path / "model" / "optimizer.safetensors").write_text("no")
    (tmp_path / "model" / "notes.txt").write_text("no")
    identity(tmp_path / "model", tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded("moe")["input_ids"] == tokenizer("moe")["input_ids"]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "generation_config.json", "receipt.json", "config.json"} <= names
    assert not names & {"optimizer.safetensors", "notes.txt"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.7
    assert identity(model).model.generation_config.temperature == 0.7


# --- the books --------------------------------------------------------------------------------------------------------


def nothing(_tensors):
    return {}


FAULTS = {
    "takes tensors that the source does not have: model.gone": [Step(takes=("model.gone",), gives=(), run=nothing)],
    "takes tensors twice: lm_head.weight": [
        Step(takes=("lm_head.weight",), gives=(), run=nothing),
        Step(takes=("lm_head.weight",), gives=(), run=nothing),
    ],
    "makes tensors twice, or makes what it also keeps: model.norm.weight": [
        Step(takes=("lm_head.weight",), gives=("model.norm.weight",), run=nothing)
    ],
    "leaves tensors of the target missing: lm_head.weight": [Step(takes=("lm_head.weight",), gives=(), run=nothing)],
    "leaves tensors over that the target does not have: model.new": [Step(takes=(), gives=("model.new",), run=nothing)],
}


@pytest.mark.parametrize("message", FAULTS)
def test_books_that_do_not_balance_are_refused_before_anything_is_read(tmp_path, message):
    source = open_source(build("llama"))
    source.read = None
    with pytest.raises(CheckpointError) as error:
        convert(source, change(source, *FAULTS[message]), tmp_path / "out")
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["missing", "left over", "misshapen"])
def test_a_source_that_is_not_what_its_config_says_is_refused_by_name(tmp_path, kind):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    tensors = tensors_of(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "left over":
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors[name].clone()
    else:
        tensors[name] = torch.zeros(23, 16)
    write(tmp_path / "model", tensors)
    expected = {
        "missing": f"missing: {name}",
        "left over": "leaves tensors over that the target does not have: model.layers.2.mlp.up_proj.weight",
        "misshapen": f"shape does not fit the target: {name} (23, 16), needed (24, 16)",
    }
    with pytest.raises(CheckpointError) as error:
        identity(tmp_path / "model", tmp_path / "out")
    assert expected[kind] in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_lost_expert_is_named(tmp_path):
    mixtral().save_pretrained(tmp_path / "model")
    tensors = tensors_of(tmp_path / "model")
    for projection in ("w1", "w3"):
        del tensors[f"model.layers.1.block_sparse_moe.experts.3.{projection}.weight"]
    write(tmp_path / "model", tensors)
    with pytest.raises(CheckpointError) as error:
        identity(tmp_path / "model", tmp_path / "out")
    assert "model.layers.1.mlp.experts.gate_up_proj (3, 48, 16), needed (4, 48, 16)" in str(error.value)


@pytest.mark.parametrize("kind", ["name", "shape"])
def test_a_step_that_gives_something_else_than_it_said_is_refused(tmp_path, kind):
    source = open_source(build("llama"))
    given = {"lm_head.weight": torch.zeros(3, 3)} if kind == "shape" else {"other": torch.zeros(61, 16)}
    step = Step(takes=("lm_head.weight",), gives=("lm_head.weight",), run=lambda _: given)
    message = {
        "name": "A step gave other tensors than it said: lm_head.weight, other",
        "shape": "shape does not fit the target: lm_head.weight (3, 3), needed (61, 16)",
    }
    with pytest.raises(CheckpointError) as error:
        convert(source, change(source, step), tmp_path / "out")
    assert message[kind] in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_a_step_drops_is_in_the_receipt_with_the_reason():
    model = build("gpt2")
    source = open_source(model)
    config = build("gpt2", n_layer=1).config
    gone = tuple(name for name in source.names if name.startswith("transformer.h.1."))
    step = Step(takes=gone, gives=(), run=nothing, why="layer 1 was taken out")
    receipt = convert(source, change(source, step, config=config)).receipt
    assert receipt.dropped == dict.fromkeys(gone, "layer 1 was taken out")
    assert receipt.consumed == len(gone)
    assert receipt.kept == receipt.tensors_out == receipt.tensors_in - len(gone)
    assert receipt.largest_logit_difference > 0


# --- promises ---------------------------------------------------------------------------------------------------------


def doubled(tensors):
    return {name: 2 * tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_broken_promise_leaves_nothing(tmp_path, in_memory):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    source = open_source(model if in_memory else tmp_path / "model")
    step = Step(takes=("lm_head.weight",), gives=("lm_head.weight",), run=doubled)
    with pytest.raises(CheckpointError, match="promises logits within 1e-05 of the source's"):
        convert(source, change(source, step, promises=1e-5), tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    measured = convert(source, change(source, step), tmp_path / "out").receipt
    largest = measured.largest_logit
    assert measured.largest_logit_difference == pytest.approx(largest, rel=1e-5)


def test_without_a_probe_the_receipt_says_so():
    receipt = identity(build("llama"), probe=None).receipt
    assert receipt.largest_logit_difference is None
    assert receipt.probe_tokens == 0
    assert str(receipt).endswith("; not probed.")


def test_a_probe_may_be_ids_or_a_batch_and_nothing_else():
    model = build("llama")
    ids = torch.arange(3, 13)[None]
    assert identity(model, probe=ids).receipt.probe_tokens == 10
    mask = torch.tensor([[1] * 7 + [0] * 3])
    assert identity(model, probe={"input_ids": ids, "attention_mask": mask}).receipt.probe_tokens == 7
    with pytest.raises(ConfigError, match="probe must be 'random', token ids"):
        identity(model, probe="words")


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is there already"):
        identity(build("llama"), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    identity(build("llama"), tmp_path / "empty", probe=None)
    assert (tmp_path / "empty" / "model.safetensors").is_file()


CUT_SHORT = [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), CheckpointError, "The disk is full"),
    (
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        CheckpointError,
        "full",
    ),
    (SafetensorError("I/O error: Input/output error (os error 5)"), CheckpointError, "could not be read or written"),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
]


@pytest.mark.parametrize(("error", "expected", "message"), CUT_SHORT)
def test_a_conversion_cut_short_leaves_nothing(tmp_path, monkeypatch, error, expected, message):
    calls = []
    real = ShardWriter._flush

    def failing(self):
        calls.append(1)
        if len(calls) == 3:
            raise error
        real(self)

    monkeypatch.setattr(ShardWriter, "_flush", failing)
    with pytest.raises(expected, match=message):
        identity(mixtral(), tmp_path / "out", shard_bytes=9_000)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(CheckpointError, match=r"needs about 0\.00 GB.*has 0\.00 GB free"):
        identity(mixtral(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_source_folder_itself_is_refused_as_target(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is there already"):
        identity(tmp_path, tmp_path)


# --- every family -----------------------------------------------------------------------------------------------------

# Experts one by one or stacked on disk, turned, interleaved, with biases, split by kind of token, with hashed layers.
FORMS = ("deepseek_v4", "ernie4_5_vl_moe", "gpt_oss", "granitemoe", "inkling", "lfm2_moe", "minimax_m2", "qwen3_vl_moe")


def check_family(family, tmp_path, *, runs):
    case = tiny(family)
    case.model.save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    # Files that are equal to the bit need not be run to be compared.
    probe = case.inputs if runs else None
    receipt = convert(source, change(source, promises=0.0), tmp_path / "out", probe=probe).receipt
    assert receipt.largest_logit_difference == (0 if runs else None)
    assert receipt.dropped == {}
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "model"))


@written_for_this_transformers
@pytest.mark.parametrize("family", FORMS)
def test_names_and_forms_on_disk_are_those_that_the_family_writes(family, tmp_path):
    check_family(family, tmp_path, runs=True)


@pytest.mark.slow
@written_for_this_transformers
@pytest.mark.parametrize("family", sorted(set(FAMILIES_OF_TRANSFORMERS) - set(FORMS)))
def test_names_and_forms_on_disk_of_every_family(family, tmp_path):
    check_family(family, tmp_path, runs=False)
