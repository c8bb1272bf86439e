"""``moesaic lab`` on the command line."""

import json
from dataclasses import replace

import pytest

from moesaic import lab
from moesaic.cli.app import run
from moesaic.lab import Failure, Gallery, Outcome, PrecisionResult, Setup, Task, picture
from moesaic.lab.balance import TRIALS


@pytest.fixture
def told(monkeypatch):
    """Stands in for the runs of a gallery; keeps what they were asked for."""
    asked = {}
    numbers = {"load_max_over_mean": 1.5, "drop_rate": 0.0, "experts_per_token": 1.0, "tokens_per_s": 1e4}
    one = Outcome(
        kind="text", recipe="hash", seed=0, score=2.5, active_params=1, total_params=4, hidden=5, options={}, **numbers
    )
    asked["gives"] = Gallery(setup=Setup(steps=3), outcomes=(one,))

    def every_recipe(*, done, **arguments):
        asked.update(arguments)
        done(asked["gives"], "hash, seed 0: 2.500")
        return asked["gives"]

    monkeypatch.setattr(lab, "every_recipe", every_recipe)
    return asked


def test_a_gallery_writes_its_page_and_prints_its_figures(told, tmp_path, capsys):
    out = tmp_path / "new" / "page.md"
    assert run(["lab", "gallery", "--recipe=hash", "--seeds=2", "--steps=3", "--out", str(out), "--json"]) == 0
    assert (told["names"], list(told["seeds"]), told["setup"], told["before"]) == (
        ["hash"],
        [0, 1],
        Setup(steps=3),
        None,
    )
    printed = capsys.readouterr()
    assert json.loads(printed.out)["outcomes"][0]["score"] == 2.5
    assert sorted(path.name for path in out.parent.iterdir()) == ["page.json", "page.md", "page.svg"]
    assert "page.md" in printed.err
    assert run(["lab", "gallery", "--recipe=hash", "--steps=3", "--resume", "--out", str(out)]) == 0
    assert told["before"] == told["gives"]


@pytest.mark.parametrize(("refused", "code"), [(True, 0), (False, 1)])
def test_a_broken_run_ends_with_1_after_the_page_is_written(told, tmp_path, capsys, refused, code):
    failure = Failure(task=Task(kind="text", recipe="glam", seed=0), reason="it fell over", refused=refused)
    told["gives"] = replace(told["gives"], failures=(failure,))
    out = tmp_path / "page.md"
    assert run(["lab", "gallery", "--out", str(out)]) == code
    assert "it fell over" in out.read_text()
    assert f"glam, seed 0, {'refused' if refused else 'failed'}: it fell over" in capsys.readouterr().err


def test_an_unknown_recipe_and_figures_that_are_not_there_are_refused(told, tmp_path, capsys):
    assert run(["lab", "gallery", "--recipe=quantum", "--out", str(tmp_path / "a.md")]) == 2
    assert "recipe must be one of" in capsys.readouterr().err
    assert run(["lab", "gallery", "--resume", "--out", str(tmp_path / "a.md")]) == 1
    assert "Start anew without --resume." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_nothing_is_begun(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(picture, "find_spec", lambda _name: None)
    assert run(["lab", "gallery", "--out", str(tmp_path / "a.md")]) == 1
    assert "pip install 'moesaic[lab]'" in capsys.readouterr().err
    assert "names" not in told


def test_balance_prints_a_row_for_each_term_and_writes_a_page(tmp_path, capsys):
    assert run(["lab", "balance", "--steps=1", "--out", str(tmp_path / "a.md"), "--json"]) == 0
    assert [one["term"] for one in json.loads(capsys.readouterr().out)] == list(TRIALS)
    assert (tmp_path / "a.md").read_text().count("\n| ") == 1 + len(TRIALS)


def test_precision_prints_a_row_for_each_run_and_writes_a_page(tmp_path, monkeypatch, capsys):
    def every_variant(*, seeds, setup, done):
        result = PrecisionResult(
            recipe="st-moe",
            variant="z-loss",
            seed=0,
            num_experts=8,
            squared_logsumexp=(4.0, 1.0),
            largest_logit=(2.0, 3.0),
            changed_choices=0.0125,
            bits_per_byte=2.0,
        )
        assert (list(seeds), setup.steps) == ([0, 1], 5)
        done(result)
        return [result]

    monkeypatch.setattr(lab, "every_variant", every_variant)
    assert run(["lab", "precision", "--seeds=2", "--steps=5", "--out", str(tmp_path / "a.md")]) == 0
    assert "1.25%" in capsys.readouterr().out
    assert "1.25%" in (tmp_path / "a.md").read_text()
