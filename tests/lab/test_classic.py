"""The experiments of 1991 and 1994, on data drawn for it: they run, go on where they stopped, and write their pages."""

import json

import pytest

from moesaic.cli.app import run
from moesaic.core.errors import CheckpointError
from moesaic.lab.classic import Record, drawn_vowels, planar_arm
from moesaic.lab.classic.vowels import LEARNERS, train


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["vowels", "robot-arm"])
def test_a_quick_run_writes_its_page_and_the_second_runs_nothing_anew(verb, tmp_path, capsys):
    asked = ["lab", verb, "--quick", "--json", "--out", str(tmp_path / "page.md"), "--work", str(tmp_path / "work")]
    assert run(asked) == 0
    figures = capsys.readouterr().out
    page = (tmp_path / "page.md").read_text()
    assert "![" in page
    assert "nan" not in page
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")
    before = (tmp_path / "work" / "quick.json").stat().st_mtime_ns
    assert run(asked) == 0
    assert capsys.readouterr().out == figures
    assert (tmp_path / "work" / "quick.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("verb", ["vowels", "robot-arm"])
def test_without_data_it_says_what_is_needed(verb, tmp_path, capsys):
    assert run(["lab", verb, "--out", str(tmp_path / "page.md"), "--work", str(tmp_path)]) != 0
    assert "See that it runs with --quick." in capsys.readouterr().err
    assert run(["lab", verb, "--data", str(tmp_path / "gone"), "--work", str(tmp_path)]) != 0
    assert "could not be read" in capsys.readouterr().err


def test_two_of_four_experts_stay_alive():
    outcome = train(LEARNERS[0], drawn_vowels(), 3.0, 0, 1500)
    assert outcome["alive"] == 2
    assert outcome["test"] > 0.8


def test_a_planar_arm_stands_on_its_head_as_physics_says():
    arm = planar_arm(40)
    assert arm.train.x_TD.shape == (30, 7)
    assert arm.y_TO.shape == (10, 2)


def test_figures_of_another_plan_are_not_mixed_in(tmp_path):
    path = tmp_path / "figures.json"
    assert Record(path, {"runs": 1}).once("a", lambda: [1]) == [1]
    assert Record(path, {"runs": 1}).once("a", lambda: [2]) == [1]
    assert json.loads(path.read_text())["runs"] == {"a": [1]}
    with pytest.raises(CheckpointError, match="other settings"):
        Record(path, {"runs": 2})
