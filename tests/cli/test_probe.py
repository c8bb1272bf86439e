"""``moesaic probe`` measures a run on its own held-out text, and tells it as a table, JSON and CSV."""

from __future__ import annotations

import csv
import json

import pytest

from moesaic.cli.app import run


@pytest.mark.parametrize("verb", ["causal", "likeness", "margins"])
def test_every_measure_has_help_with_an_example(verb, capsys):
    assert run(["probe", verb, "--help"]) == 0
    assert f"Example: moesaic probe {verb} runs/a" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("how", ["off", "swap"])
def test_experts_are_taken_away_and_the_loss_is_told_by_domain(finished, tmp_path, capsys, how):
    file = tmp_path / "made" / "causal.csv"
    assert run(["probe", "causal", str(finished), "--how", how, "--tokens=300", "--csv", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    domains = [name for name in told["nats_per_token"] if name != "all"]
    assert told["num_tests"] == len(domains) * 8
    assert len(told["effects"]) == 8
    with file.open(newline="", encoding="utf-8") as opened:
        lines = list(csv.DictReader(opened))
    assert len(lines) == 8 * (len(domains) + 1)
    first = told["effects"][0]["changes"][0]
    assert float(lines[0]["nats_per_token"]) == first["nats_per_token"]
    assert (lines[0]["partner"] == "") == (how == "off")


def test_chosen_experts_make_a_table(finished, capsys):
    assert run(["probe", "causal", str(finished), "--expert=1:2", "--expert=0:0", "--tokens=200"]) == 0
    out = capsys.readouterr().out
    assert "1:2" in out
    assert "0:0" in out
    assert "At a false discovery rate of 5 %" in " ".join(out.split())


def test_likeness_and_margins_are_told(finished, capsys):
    assert run(["probe", "likeness", str(finished), "--tokens=32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["num_experts"] for one in told] == [4, 4]
    assert told[0]["aligned"]["mean"] >= told[0]["weights"]["mean"]
    assert run(["probe", "likeness", str(finished), "--tokens=32", "--no-align"]) == 0
    assert "outputs, CKA" in capsys.readouterr().out
    assert run(["probe", "margins", str(finished), "--tokens=200", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [one["what"] for one in layers[0]["flips"]][-1] == "model in bfloat16"
    assert run(["probe", "margins", str(finished), "--tokens=200", "--no-end-to-end"]) == 0
    assert "Margins of logits" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["3", "a:1", "0:", "0:-1"])
def test_an_expert_is_named_by_two_numbers(finished, given, capsys):
    assert run(["probe", "causal", str(finished), f"--expert={given}"]) == 2
    assert f"--expert must be LAYER:EXPERT, two numbers from 0, got '{given}'. Use 0:3." in capsys.readouterr().err
