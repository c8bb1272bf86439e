"""Run folders: what is written, what is refused, what is read back."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.core.errors import CheckpointError, ConfigError, DataError
from moesaic.data import load_tokenizer
from moesaic.train import Evaluator, folder, history, load_trained, resume, train
from moesaic.train.build import build_model
from moesaic.train.interrupt import TrainingStoppedError


def test_a_run_folder_holds_what_the_format_says(tiny):
    config = tiny(twin=True)
    summary = train(config)
    assert json.loads((config.out / "summary.json").read_text()) == summary
    keys = {
        "bits_per_byte",
        "total_params",
        "active_params",
        "tokens",
        "tokens_per_s",
        "load_max_over_mean",
        "drop_rate",
    }
    for kind in ("moe", "dense"):
        assert set(summary[kind]) == keys
        assert list(summary[kind]["bits_per_byte"]) == ["north", "south", "mean"]
        assert summary[kind]["tokens"] == 8 * 2 * 2 * 24
        home = config.out / kind
        assert json.loads((home / "summary.json").read_text()) == {kind: summary[kind]}
        present = {path.name for path in home.iterdir()}
        assert {"run.json", "history.jsonl", "checkpoints", "model", "summary.json", "tensorboard"} <= present
        evaluations = [line for line in history.read(home / "history.jsonl") if line["kind"] == "eval"]
        assert [line["step"] for line in evaluations] == [4, 8]
        assert evaluations[-1]["bits_per_byte"] == summary[kind]["bits_per_byte"]
    assert summary["moe"]["load_max_over_mean"] >= 1
    assert summary["moe"]["drop_rate"] == 0
    assert summary["dense"]["load_max_over_mean"] is None
    assert summary["dense"]["drop_rate"] is None
    assert summary["moe"]["active_params"] <= summary["dense"]["active_params"] == summary["dense"]["total_params"]


def test_both_models_read_the_same_tokens_in_the_same_order(tiny, monkeypatch):
    from moesaic.train.trainer import MoeTrainer

    read, real = {}, MoeTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        read.setdefault(type(model).__name__, []).append(inputs["input_ids"].clone())
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MoeTrainer, "training_step", training_step)
    train(tiny(twin=True))
    first, second = (torch.stack(batches) for batches in read.values())
    assert torch.equal(first, second)


def test_the_same_seed_trains_the_same_model_and_another_seed_another(tiny):
    runs = [train(tiny(name, seed=seed))["moe"]["bits_per_byte"] for name, seed in (("a", 5), ("b", 5), ("c", 6))]
    assert runs[0] == runs[1] != runs[2]


def test_gradient_accumulation_changes_nothing_but_rounding(tiny):
    # Mixtral's balance loss is a statistic of the micro-batch, so it is switched off here.
    off = {"aux_coefficients": {"switch": 0.0}, "clip": 1e9}
    whole = train(tiny("whole", batch_size=4, grad_accumulation=1, **off))
    cut = train(tiny("cut", batch_size=2, grad_accumulation=2, **off))
    assert cut["moe"]["bits_per_byte"] == pytest.approx(whole["moe"]["bits_per_byte"], rel=1e-3)


def test_norms_and_biases_do_not_decay(tiny):
    from moesaic.data import load_tokenizer
    from moesaic.train.build import build_model, training_arguments
    from moesaic.train.trainer import MoeTrainer

    config = tiny(backbone="qwen3")
    model = build_model("moe", config, load_tokenizer("bytes"))
    trainer = MoeTrainer(model=model, args=training_arguments(config, config.out), eval_dataset=[])
    decayed = set(trainer.get_decay_parameter_names(model))
    for name, parameter in model.named_parameters():
        assert (name in decayed) == (parameter.ndim > 1), name


def test_a_folder_that_is_not_empty_is_refused(tiny):
    config = tiny()
    train(config)
    with pytest.raises(ConfigError) as error:
        train(config)
    assert str(error.value) == (
        f"{config.out} already holds a run. Go on with it with --resume, replace it with --overwrite, "
        "or name another folder."
    )
    train(config, overwrite=True)


def test_overwriting_deletes_runs_of_ours_only(tiny):
    config = tiny()
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("ten years")
    with pytest.raises(ConfigError) as error:
        train(config, overwrite=True)
    assert str(error.value) == (
        f"{config.out} is not empty and is no run of Moesaic (it has no run.json), so --overwrite does not delete it. "
        "Name another folder, or delete it yourself."
    )
    assert (config.out / "thesis.txt").read_text() == "ten years"
    with pytest.raises(ConfigError, match=r"is not empty\. Name a folder that does not exist yet\.$"):
        train(config)


def test_overwriting_spares_a_run_that_holds_the_data_of_the_new_one(tiny, text):
    config = tiny()
    train(config)
    shutil.copytree(text, config.out / "corpus")
    new = replace(config, data=str(config.out / "corpus"))
    with pytest.raises(ConfigError) as error:
        train(new, overwrite=True)
    assert str(error.value) == (
        f"{new.data} lies inside the run folder {config.out}, which --overwrite would delete. Move it elsewhere first."
    )
    assert (config.out / "summary.json").exists()


def test_a_signal_during_the_last_evaluation_stops_before_the_twin_starts(tiny, monkeypatch):
    config = tiny(twin=True)
    evaluate = Evaluator.__call__

    def interrupted(self, model):
        if len(self._chosen) == len(self.blocks):
            signal.raise_signal(signal.SIGINT)
        return evaluate(self, model)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "__call__", interrupted)
        with pytest.raises(TrainingStoppedError) as error:
            train(replace(config, eval_tokens=30))
    assert str(error.value) == (
        f"Stopped as asked, after the last step of {config.out / 'moe'}; it is finished. "
        f"Go on with: moesaic train --resume --out {config.out}"
    )
    assert not (config.out / "dense" / "history.jsonl").exists()
    assert set(resume(config.out)) == {"moe", "dense"}


def test_bad_data_damage_nothing(tiny, tmp_path):
    config = tiny()
    train(config)
    before = (config.out / "run.json").read_text()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError):
        train(tiny(data=str(tmp_path / "empty.txt")), overwrite=True)
    assert (config.out / "run.json").read_text() == before
    with pytest.raises(DataError):
        train(tiny("other", data=str(tmp_path / "absent.txt")))
    assert not (tmp_path / "other").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError) as error:
        folder.read(tmp_path / "absent")
    assert str(error.value) == f"There is no folder {tmp_path}/absent. Name the folder given to --out in training."
    with pytest.raises(CheckpointError) as error:
        load_trained(tmp_path)
    assert str(error.value) == f"{tmp_path} is not a run folder: it has no run.json. Name the folder given to --out."


def test_a_run_that_may_not_be_read_is_not_told_to_be_overwritten(tiny, monkeypatch):
    config = tiny()
    train(config)

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(CheckpointError) as error:
        folder.read(config.out)
    assert str(error.value) == (
        f"{config.out}/run.json cannot be read: Permission denied. Check who may read it, and the disk."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("[]", "cannot be read: it is not a JSON object"),
        ('{"format_version": 7}', "is of format 7, this version of Moesaic reads format 1. Use the version that"),
        ('{"format_version": 1}', "lacks 'kind'. Start the run anew with --overwrite."),
        (
            '{"format_version": 1, "kind": "moe", "settings": {"steps": -3}, "data": {"fingerprint": ""}}',
            "has settings that cannot be: steps must be at least 1, got -3. Raise steps. Put back the file that "
            "training wrote, or start the run anew with --overwrite.",
        ),
        (
            '{"format_version": 1, "kind": "moe", "settings": {"options": 5}, "data": {"fingerprint": ""}}',
            "has settings that cannot be: ",
        ),
    ],
)
def test_a_damaged_run_json_is_named(tmp_path, text, message):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        folder.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/run.json {message}")


def test_a_trained_model_is_read_back_from_its_run_or_its_folder(tiny):
    config = tiny()
    train(config)
    by_run, by_folder = load_trained(config.out), load_trained(config.out / "model")
    assert by_run.run is not None
    assert by_folder.run is None
    ids = torch.arange(20)[None] + 97
    with torch.no_grad():
        assert torch.equal(by_run.model(input_ids=ids).logits, by_folder.model(input_ids=ids).logits)
    assert not by_run.model.training


def test_a_run_that_has_not_finished_is_read_from_its_last_checkpoint(tiny):
    import shutil

    config = tiny()
    train(config)
    shutil.rmtree(config.out / "model")
    assert load_trained(config.out).path.name == "checkpoint-8"
    shutil.rmtree(config.out / "checkpoints")
    with pytest.raises(CheckpointError) as error:
        load_trained(config.out)
    assert str(error.value) == (
        f"The run in {config.out} has no model yet: it saved no whole checkpoint. "
        f"Go on with: moesaic train --resume --out {config.out}"
    )


def test_a_corrupted_or_foreign_model_is_refused(tiny, tmp_path):
    config = tiny()
    train(config)
    weights = config.out / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(
        CheckpointError, match=r"model/model\.safetensors should be \d+ bytes long and is \d+\. Go back"
    ):
        load_trained(config.out)
    (config.out / "model" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"are damaged|does not hold a readable model"):
        load_trained(config.out)
    weights.write_bytes(whole)
    (config.out / "model" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="a pickled file"):
        load_trained(config.out)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(CheckpointError, match=r"^.*foreign does not hold a readable model"):
        load_trained(tmp_path / "foreign")


def test_a_config_json_that_was_edited_is_named(tiny, tmp_path):
    build_model("moe", tiny(), load_tokenizer("bytes")).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"top_k": 2', '"top_k": 99'))
    with pytest.raises(CheckpointError) as error:
        load_trained(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/config.json asks for a model that cannot be: top_k must be between 1 and num_experts=4, got 99. "
        "Lower top_k, or add experts. Go back to a checkpoint, or copy the folder again from where it was saved."
    )


def test_a_model_folder_without_a_tokenizer_is_told_from_one_without_a_model(tiny, tmp_path):
    build_model("dense", tiny(), load_tokenizer("bytes")).save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError) as error:
        load_trained(tmp_path / "bare")
    assert str(error.value).startswith(f"{tmp_path}/bare holds a model but no readable tokenizer (")
    assert str(error.value).endswith("Save the one that it was trained with beside it, with tokenizer.save_pretrained.")


def test_bfloat16_trains_with_float32_weights(tiny):
    config = tiny(dtype="bfloat16", recipe="deepseek-v3", top_k=2)
    summary = train(config)
    assert summary["moe"]["bits_per_byte"]["mean"] < 9
    assert {parameter.dtype for parameter in load_trained(config.out).model.parameters()} == {torch.float32}
