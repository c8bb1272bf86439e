"""``moesaic zoo``: the table, one model, and errors."""

from __future__ import annotations

import json

import pytest

from moesaic import zoo
from moesaic.cli.app import run
from tests.zoo.configs import CONFIGS


def test_the_table_has_every_model(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert run(["zoo"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in zoo.names())


def test_json_has_the_numbers_of_the_library_and_a_filter_leaves_the_rest_out(capsys):
    assert run(["zoo", "--filter", "Qwen3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == ["qwen3-30b-a3b", "qwen3-235b-a22b"]
    assert found[0]["num_params"] == 30_532_122_624
    assert found[0]["params"]["experts"] == 48 * 128 * 3 * 2048 * 768
    assert found[0]["published"]["total"] == "30.5B"


def test_show_has_parts_totals_source_and_the_published_figure_with_the_difference(capsys):
    assert run(["zoo", "show", "mixtral-8x7b"]) == 0
    printed = capsys.readouterr().out
    assert "0-31" in printed
    assert "2 of 8 experts, 14336 wide" in printed
    assert "46,702,792,704" in printed
    assert "12,748,853,248 without input embedding" in printed
    assert "published 46.7B (release notes of Mistral AI, December 2023): counted +0.01% of it" in printed
    assert "arXiv:2401.04088" in printed


def test_show_takes_a_configuration_of_transformers(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt-oss-20b"]))
    assert run(["zoo", "show", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_params"] == zoo.get("gpt-oss-20b").num_params
    assert run(["zoo", "show", str(tmp_path / "config.json")]) == 0
    assert "20,914,757,184" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["switch-base-128", "jamba-v0.1", "shazeer-moe-143m", "minimax-text-01", "arctic"])
def test_show_tells_every_kind_of_layer(name, capsys):
    assert run(["zoo", "show", name]) == 0
    assert f"{zoo.get(name).num_params:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["zoo", "show", "mixtrall"], 2, "Did you mean"),
        (["zoo", "--filter", "abacus"], 2, "which is in none of 65"),
        (["zoo", "show", "no/such/folder"], 1, "no such file"),
    ],
)
def test_a_wrong_name_is_one_line_and_an_exit_code(arguments, code, said, capsys):
    assert run(arguments) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
