"""``moesaic convert`` from the command line: receipts on standard output, what is wrong on standard error."""

import json

import pytest
from transformers import AutoModelForCausalLM

from moesaic.cli.app import run
from moesaic.convert.proof.receipt import Receipt
from tests.convert.backbones import dense, sparse


def said(capsys):
    out, err = capsys.readouterr()
    return out, err


@pytest.fixture
def folder(tmp_path):
    sparse("llama", "mixtral").save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize("verb", [[], ["export"], ["check"]])
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run(["convert", *verb, "--help"]) == 0
    assert " ".join(["Example: moesaic convert", *verb]) in said(capsys)[0].replace("\n", " ")


def test_an_export_prints_its_receipt_in_a_line_and_where_it_is(folder, tmp_path, capsys):
    assert run(["convert", "export", str(folder), "--out", str(tmp_path / "served")]) == 0
    out, err = said(capsys)
    line, note, where = out.splitlines()
    assert line.startswith("export to mixtral: 23 tensors in, 21 out (15 kept, 8 consumed, 6 made, 0 dropped), ")
    assert "100.00% of routes equal, on 120 tokens in float64." in line
    assert note == "  balance losses and controllers are for training and do not go along"
    assert where == f"Written to {tmp_path / 'served'}, with its receipt in receipt.json."
    assert err == ""
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "served").config.model_type == "mixtral"


def test_json_is_the_receipt(folder, tmp_path, capsys):
    served = tmp_path / "served"
    assert run(["convert", "export", str(folder), "--out", str(served), "--json", "--no-probe"]) == 0
    values = json.loads(said(capsys)[0])
    assert values["method"] == "export to mixtral"
    assert values["probe_tokens"] == 0
    assert (
        (served / "receipt.json").read_text() == Receipt.load(served).to_json() == json.dumps(values, indent=1) + "\n"
    )


def test_a_run_is_exported(finished, tmp_path, capsys):
    assert run(["convert", "export", str(finished), "--out", str(tmp_path / "served"), "--family=mixtral"]) == 0
    assert said(capsys)[0].startswith("export to mixtral: ")
    assert (tmp_path / "served" / "tokenizer.json").is_file()
    assert run(["convert", "check", str(tmp_path / "served")]) == 0
    assert said(capsys)[0].startswith(f"{tmp_path / 'served'} is what its receipt says. export to mixtral: ")


def test_a_folder_that_was_changed_is_found(folder, tmp_path, capsys):
    assert run(["convert", "export", str(folder), "--out", str(tmp_path / "served")]) == 0
    (tmp_path / "served" / "config.json").write_text("{}")
    said(capsys)
    assert run(["convert", "check", str(tmp_path / "served")]) == 1
    assert "config.json is not what was written" in said(capsys)[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--family", "mixtrl"], 2, "family must be 'auto' or one of mixtral, "),
        (["--family", "qwen3_moe"], 2, "qwen3_moe has no place for the attention of llama"),
        (["--family", "olmoe"], 2, "No sparse model can be exported to olmoe: its attention normalises"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, arguments, code, message):
    assert run(["convert", "export", str(folder), "--out", str(tmp_path / "served"), *arguments]) == code
    out, err = said(capsys)
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "served").exists()


def test_capacity_needs_a_word(tmp_path, capsys):
    sparse("t5", "switch").save_pretrained(tmp_path / "ours")
    arguments = ["convert", "export", str(tmp_path / "ours"), "--out", str(tmp_path / "served")]
    assert run(arguments) == 2
    assert "capacity dropping (eval_capacity_factor=2; 4 would drop nothing)" in said(capsys)[1]
    assert run([*arguments, "--dropless"]) == 0
    assert "(nothing promised)" in said(capsys)[0]


def test_bad_sources_and_targets(folder, tmp_path, capsys):
    assert run(["convert", "export", str(tmp_path / "gone"), "--out", str(tmp_path / "out")]) == 1
    assert "There is no folder" in said(capsys)[1]
    dense("llama").save_pretrained(tmp_path / "dense")
    assert run(["convert", "export", str(tmp_path / "dense"), "--out", str(tmp_path / "out")]) == 2
    assert "export needs a model made with moesaic.sparsify" in said(capsys)[1]
    assert run(["convert", "export", str(folder), "--out", str(folder)]) == 2
    assert "is there already" in said(capsys)[1]
    assert run(["convert", "export", str(folder)]) == 2
    assert "--out" in said(capsys)[1]
