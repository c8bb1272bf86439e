"""The verbs of ``moesaic convert`` that turn dense models into mixtures, on the dense twin of a tiny finished run."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.cli.app import run
from moesaic.hf import moe_layers

VERBS = {
    "upcycle": ["--num-experts=4", "--top-k=2", "--granularity=2"],
    "split": ["--num-experts=2", "--top-k=2", "--tokens=300"],
}


@pytest.fixture(scope="session")
def dense(finished):
    return finished / "dense"


@pytest.mark.parametrize("verb", ["upcycle", "split", "mix"])
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run(["convert", verb, "--help"]) == 0
    assert f"Example: moesaic convert {verb}" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_writes_a_model_with_its_tokenizer_and_prints_the_receipt(verb, dense, text, tmp_path, capsys):
    out = tmp_path / "new"
    data = ["--data", str(text)] if verb == "split" else []
    assert run(["convert", verb, str(dense), "--out", str(out), *VERBS[verb], *data, "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["method"] == verb
    assert receipt["promised"] == (1e-5 if verb == "upcycle" else None)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(moe_layers(model)) == 2
    assert (out / "tokenizer.json").is_file()


def test_upcycle_takes_layers_options_of_the_recipe_and_what_changes_experts(dense, tmp_path, capsys):
    given = ["--recipe=deepseek-v3", "--num-experts=4", "--top-k=2", "--option", "scale=1.0", "--layers", "1"]
    more = ["--method=drop", "--drop-ratio=0.25", "--noise=0.01", "--router-std=0.1", "--seed=3"]
    assert run(["convert", "upcycle", str(dense), "--out", str(tmp_path / "new"), *given, *more]) == 0
    first, *notes, last = capsys.readouterr().out.splitlines()
    assert first.startswith("upcycle: ")
    assert notes[:3] == [
        "  recipe deepseek-v3: 4 experts in 1 layers, copies of the dense network",
        "  25% of each expert's neurons drawn anew",
        "  noise of 0.01 times the weights' spread on every expert",
    ]
    assert last.endswith("with its receipt in receipt.json.")


def test_split_does_without_text_and_takes_a_number_as_scale(dense, tmp_path, capsys):
    given = ["--num-experts=2", "--top-k=2", "--data=none", "--method=random", "--gate=zero", "--scale=2", "--json"]
    assert run(["convert", "split", str(dense), "--out", str(tmp_path / "new"), *given]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["promised"] == 1e-5
    assert receipt["largest_logit_difference"] < 1e-6


def test_mix_reads_prompts_from_files(dense, tmp_path, capsys):
    for name, lines in (("one.txt", "a king\na queen\n"), ("two.txt", "1 + 1\n\n2 + 2\n")):
        (tmp_path / name).write_text(lines)
    prompts = [f"--prompts={tmp_path / name}" for name in ("one.txt", "two.txt")]
    out = tmp_path / "new"
    assert run(["convert", "mix", str(dense), str(dense), str(dense), "--out", str(out), "--top-k=2", *prompts]) == 0
    assert "gates point to the experts' prompts" in capsys.readouterr().out
    weight = moe_layers(AutoModelForCausalLM.from_pretrained(out))["model.layers.0.mlp"].router.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upcycle", "--method=cut"], "method must be 'copy' or 'drop', got 'cut'."),
        (["upcycle", "--option=jitter"], "--option must be key=value, got 'jitter'."),
        (["upcycle", "--num-experts=4", "--top-k=5"], "top_k must be between 1 and num_experts=4, got 5."),
        (["split", "--method=metis", "--data=none"], "method must be one of random, cluster"),
        (["split", "--scale=half", "--data=none"], "scale must be 'fit', 'slices', 'published' or a number"),
    ],
)
def test_bad_arguments_end_with_two_and_say_why(arguments, message, dense, tmp_path, capsys):
    verb, *rest = arguments
    assert run(["convert", verb, str(dense), "--out", str(tmp_path / "new"), *rest]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_prompts_that_cannot_be_read_end_with_one(dense, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("empty.txt", "missing.txt"):
        given = [str(dense)] * 3 + ["--out", str(tmp_path / "new"), "--top-k=2", f"--prompts={tmp_path / name}"]
        assert run(["convert", "mix", *given]) == 1
    assert "has no prompt in it" in capsys.readouterr().err
