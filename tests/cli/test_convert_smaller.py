"""The verbs of ``moesaic convert`` that make a mixture smaller, on a tiny finished run."""

import json

import pytest
from transformers import AutoModelForCausalLM

from moesaic.cli.app import run
from tests.cli.conftest import SIZES

VERBS = {
    "prune": ["--keep", "2", "--tokens", "500"],
    "merge": ["--to", "0.5", "--tokens", "500"],
    "top-k": ["--top-k", "1"],
    "dense": ["--method", "distill", "--steps", "2", "--tokens", "200"],
}


@pytest.fixture(scope="session")
def olmoe(text, tmp_path_factory):
    """A recipe whose weights are scores as they are, so that one choice is enough for it."""
    out = tmp_path_factory.mktemp("runs") / "olmoe"
    options = ["--recipe", "olmoe", "--top-k=2", "--steps=2", "--no-report", "--no-twin"]
    assert run(["train", "--data", str(text), "--out", str(out), *options, *SIZES]) == 0
    return out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run(["convert", verb, "--help"]) == 0
    assert f"Example: moesaic convert {verb}" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_writes_a_model_with_its_tokenizer_and_prints_the_receipt(verb, olmoe, text, tmp_path, capsys):
    out = tmp_path / "new"
    data = [] if verb == "top-k" else ["--data", str(text)]
    assert run(["convert", verb, str(olmoe), "--out", str(out), *VERBS[verb], *data, "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["largest_logit_difference"] > 0
    assert receipt["promised"] is None
    assert receipt["notes"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (out / "tokenizer.json").is_file()
    count = sum(parameter.numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(olmoe / "model").parameters())
    assert count < whole or verb == "top-k"


def test_the_receipt_is_one_line_and_its_notes(olmoe, text, tmp_path, capsys):
    arguments = ["--keep", "0.5", "--data", str(text), "--tokens", "500", "--protect-super-experts", "--no-probe"]
    assert run(["convert", "prune", str(olmoe), "--out", str(tmp_path / "new"), *arguments]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("prune_experts by reap: ")
    assert first.endswith("not probed.")
    assert ": kept 2 of 4 experts; pruned " in rest[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prune", "--keep", "half"],
            "--keep must be a number of experts, or a share of them such as 0.5, got 'half'.",
        ),
        (["prune", "--keep", "9"], "Experts to keep must be between 1 and 4, the number that a layer has, got 9."),
        (["prune", "--keep", "2", "--by", "luck"], "by must be one of reap, frequency, ean, weight, got 'luck'."),
        (["merge", "--to", "2", "--cluster", "names"], "cluster must be one of outputs, functions, weights, router"),
        (["top-k", "--top-k", "3"], "top_k must be at least 1 and below what it is now, 2 at"),
        (["dense", "--method", "sum"], "method must be one of merge, concat, expert, distill, got 'sum'."),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, message, olmoe, text, tmp_path, capsys):
    verb, *rest = arguments
    data = [] if verb == "top-k" else ["--data", str(text), "--tokens", "100"]
    assert run(["convert", verb, str(olmoe), "--out", str(tmp_path / "new"), *rest, *data]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_there_is_code_1(tmp_path, capsys):
    assert run(["convert", "prune", str(tmp_path / "none"), "--keep", "1", "--out", str(tmp_path / "new")]) == 1
    assert "There is no folder" in capsys.readouterr().err
