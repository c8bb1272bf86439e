"""``moesaic bench`` on the command line."""

import json

import pytest

from moesaic.cli.app import run

VERBS = ("layer", "model", "decode", "memory", "scale", "page")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    assert run(["bench", verb, "--help"]) == 0
    assert f"Example: moesaic bench {verb}" in capsys.readouterr().out.replace("\n", " ")


def test_a_quick_layer_prints_tables_and_writes_its_figures_under_the_name_of_the_device(tmp_path, capsys):
    arguments = ["bench", "layer", "--quick", "--case=coarse", "--dtype=float32", "--mode=forward", "--no-parts"]
    assert run([*arguments, "--threads=1", "--only=torch", "--out", str(tmp_path / "new")]) == 0
    out, err = capsys.readouterr()
    assert "coarse, balanced, float32, forward" in out
    assert "moesaic torch" in out
    (written,) = (tmp_path / "new").iterdir()
    assert written.name.endswith("-cores-layer.json")
    assert str(written) in err.replace("\n", "")
    assert json.loads(written.read_text("utf-8"))["groups"][0]["facts"]["case"] == "coarse"


def test_json_is_all_that_is_printed(capsys):
    arguments = ["bench", "memory", "--quick", "--case=coarse", "--dtype=float32", "--only=torch", "--json"]
    assert run(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["verb"] == "memory"
    assert {line["name"] for line in values["groups"][0]["lines"]} >= {"moesaic torch", "transformers grouped_mm"}


def test_sizes_can_be_given(capsys):
    sizes = ["--tokens=24", "--width=16", "--hidden=8", "--experts=4", "--top-k=3", "--zipf=1", "--shared"]
    arguments = ["bench", "layer", "--case=fine", "--dtype=float32", "--mode=train", "--only=torch", "--no-parts"]
    assert run([*arguments, *sizes, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["groups"][0]["facts"]
    assert [facts[name] for name in ("T", "D", "F", "E", "K", "zipf", "shared")] == [24, 16, 8, 4, 3, 1.0, 24]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer", "--case=finest"], "case must be one of coarse, fine, very-fine, big-coarse, big-fine, got 'finest'"),
        (["layer", "--dtype=int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["decode", "--device=tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["layer", "--mode=dream"], "mode must be train or forward, got 'dream'"),
    ],
)
def test_bad_arguments_end_with_2_and_one_line(arguments, message, capsys):
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_page_is_written_from_a_folder_of_figures(tmp_path, capsys):
    results = tmp_path / "results"
    assert run(["bench", "memory", "--quick", "--case=coarse", "--dtype=float32", "--out", str(results)]) == 0
    assert run(["bench", "page", "--results", str(results), "--out", str(tmp_path / "speed.md")]) == 0
    assert "### Memory of a training step" in (tmp_path / "speed.md").read_text("utf-8")
    assert run(["bench", "page", "--results", str(tmp_path / "none")]) == 1
    assert "A page needs results" in capsys.readouterr().err
