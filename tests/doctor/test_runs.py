"""Real runs, trained for a second or two, with and without a fault; and folders that hold only a part of one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moesaic.cli.app import run
from moesaic.core.errors import CheckpointError, ConfigError, DataError
from moesaic.doctor import examine
from moesaic.doctor.history import read_history
from moesaic.train import train
from tests.doctor.patients import complaints, verdicts
from tests.train.conftest import small, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """Trains a run once for each set of settings."""
    made = {}

    def one(name, **changes):
        if name not in made:
            out = tmp_path_factory.mktemp("runs") / name
            length = {"steps": 100, "batch_size": 4, "grad_accumulation": 1, "save_every": 100, "eval_every": 100}
            train(small(out, text, **{**length, "log_every": 5, "lr": 1e-2, "num_experts": 8, **changes}))
            made[name] = out
        return made[name]

    return one


# In so few steps the published strengths do not even the load out, and the doctor says so: stronger ones do.
HEALTHY = {
    "mixtral": {"recipe": "mixtral", "top_k": 2, "aux_coefficients": {"switch": 0.01}},
    "loss-free": {"recipe": "deepseek-v3", "top_k": 2, "balance": {"sequence": 1e-3, "bias": 0.02}},
    "switch": {"recipe": "switch", "aux_coefficients": {"switch": 0.05}},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_told_healthy(name, trained):
    report = examine(trained(name, **HEALTHY[name]))
    assert complaints(report) == {}, str(report)
    assert report.verdict == "healthy"
    assert report.read.endswith("tokens of held-out text of " + report.read.rpartition(" of ")[2])


def test_a_coefficient_that_is_far_too_strong_is_found(trained):
    report = examine(trained("strong", recipe="mixtral", top_k=2, aux_coefficients={"switch": 30.0}))
    assert report["balance not too strong"].verdict == "sick", str(report)
    assert "Balance drowns the task" in report["balance not too strong"].words


def test_a_coefficient_of_zero_is_found(trained):
    report = examine(trained("weak", recipe="mixtral", top_k=2, aux_coefficients={"switch": 0.0}))
    assert report["balance not too weak"].verdict in ("warning", "sick"), str(report)
    assert "Nothing keeps the load even" in report["balance not too weak"].words
    assert report["balance loss attached"].verdict == "not checked"


# --- parts of a run ---------------------------------------------------------------------------------------------------


def test_the_history_has_what_the_checks_need(trained):
    history = read_history(trained("loss-free", **HEALTHY["loss-free"]) / "history.jsonl")
    assert history.num_lines == 20
    assert set(history.router_logit) == set(history.bias) == set(history.load)
    assert all(bias.shape == (20, 8) for bias in history.bias.values())
    assert all(abs(bias.mean(axis=1)).max() < 1e-6 for bias in history.bias.values())


def test_a_bare_history_is_examined_as_far_as_it_goes(trained, tmp_path):
    shutil.copy(trained("mixtral", **HEALTHY["mixtral"]) / "history.jsonl", tmp_path)
    for path in (tmp_path, tmp_path / "history.jsonl"):
        report = examine(path)
        found = verdicts(report)
        assert found["router logits"] == found["dropped rows"] == found["overfull experts"] == "healthy"
        assert found["padding ignored"] == found["balance loss attached"] == "not checked"
        assert report["padding ignored"].words == "There is a history and no model."


def test_a_run_that_saved_nothing_yet_is_examined_by_its_history(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained("mixtral", **HEALTHY["mixtral"]), folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints")
    assert examine(folder)["padding ignored"].words == "The run has saved no whole checkpoint yet."


def test_a_model_folder_without_its_run_is_examined_on_text_that_is_named(trained, text):
    report = examine(trained("switch", **HEALTHY["switch"]) / "model", data=str(text))
    assert verdicts(report)["balance loss attached"] == "healthy"
    assert report["router logits"].words.endswith("how it got there is not known, as there is no history of it.")


@pytest.mark.parametrize("fault", ["cut short", "a tensor missing"])
def test_a_model_that_lost_weights_is_sick_and_the_rest_is_not_checked(fault, trained, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(trained("mixtral", **HEALTHY["mixtral"]) / "model", folder)
    (folder / "manifest.json").unlink()
    weights = folder / "model.safetensors"
    if fault == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        tensors = load_file(weights)
        tensors.pop(next(name for name in tensors if "experts" in name))
        save_file(tensors, weights, metadata={"format": "pt"})
    report = examine(folder)
    assert report["numbers finite"].verdict == "sick"
    assert "experts" in report["numbers finite"].words or "damaged" in report["numbers finite"].words
    assert {finding.verdict for finding in report.findings[1:]} == {"not checked"}


def test_a_nan_in_saved_weights_is_found(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(trained("mixtral", **HEALTHY["mixtral"]) / "model", folder)
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("router.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in examine(folder)["numbers finite"].words


def test_what_holds_nothing_to_examine_is_refused(tmp_path, trained):
    with pytest.raises(CheckpointError) as error:
        examine(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds nothing to examine: what is needed is a run folder (with run.json), a model folder (with "
        "config.json), or a history.jsonl. Name the folder given to --out in training, or a model's."
    )
    (tmp_path / "history.jsonl").write_text('{"kind": "eval", "step": 1}\n')
    with pytest.raises(DataError, match="has no line of training"):
        examine(tmp_path)
    with pytest.raises(DataError, match="which does not exist"):
        examine(trained("mixtral", **HEALTHY["mixtral"]), data=str(tmp_path / "absent.txt"))
    dense = tmp_path / "dense"
    shutil.copytree(trained("mixtral", **HEALTHY["mixtral"]), dense)
    record = json.loads((dense / "run.json").read_text())
    (dense / "run.json").write_text(json.dumps({**record, "kind": "dense"}))
    with pytest.raises(ConfigError, match="is the run of a dense model"):
        examine(dense)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_ends_with_0_for_a_healthy_run(trained, capsys):
    assert run(["doctor", str(trained("mixtral", **HEALTHY["mixtral"])), "--tokens=2048"]) == 0
    printed = capsys.readouterr().out
    assert "balance loss attached" in printed
    assert "healthy: 14 healthy, 1 not checked" in printed


def test_the_command_ends_with_1_for_a_sick_run_and_prints_json(trained, tmp_path, capsys):
    history = tmp_path / "history.jsonl"
    shutil.copy(trained("mixtral", **HEALTHY["mixtral"]) / "history.jsonl", history)
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line["load"] = {layer: [0.0, *[1 / 7] * 7] for layer in line["load"]}
    history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(["doctor", str(history), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "sick"
    assert [one["name"] for one in printed["findings"] if one["verdict"] == "sick"] == ["dead experts"]


def test_the_command_says_what_a_path_lacks(tmp_path, capsys):
    assert run(["doctor", str(tmp_path / "absent")]) == 1
    assert "holds nothing to examine" in capsys.readouterr().err
