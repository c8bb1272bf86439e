"""The page of results."""

from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.bench import page
from moesaic.bench.picture import picture
from moesaic.bench.result import Goal, Group, Line, Result
from moesaic.core.errors import DataError

from .test_result import MACHINE

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _line(name, value, **more):
    return Line(name=name, samples=(0.9 * value, value, 1.1 * value), ratios=(value / 2,) * 3, **more)


def _group(title, *lines, unit="ms", limit="dense", **facts):
    return Group(title=title, unit=unit, limit=limit, lines=lines, facts={"case": "fine", "dtype": "float32", **facts})


def _result(verb, *groups):
    return Result(verb=verb, machine=MACHINE, rounds=5, about=(f"How {verb} went.",), groups=groups)


GOAL = Goal(what="of dense", bound=1.2, at_most=True, value=1.5)
EVERY = (
    _result(
        "layer",
        _group(
            "fine, step",
            _line("moesaic torch", 3.0, goals=(GOAL,)),
            Line(name="transformers batched_mm", note="too large"),
            _line("dense", 2.0, note="the limit"),
            mode="train",
            kind="times",
        ),
        _group("fine, parts", _line("whole layer", 3.0), limit="whole layer", mode="train", kind="parts"),
    ),
    _result("model", _group("a model", _line("moesaic, adopted", 900.0), unit="tokens/s")),
    _result("decode", _group("one token", _line("moesaic torch", 5.0), _line("dense", 4.0), T=1)),
    _result("memory", _group("kept", _line("moesaic torch", 5.0), unit="MiB", mode="held_bytes")),
    _result("scale", _group("by T", _line("moesaic, T=1", 5.0), _line("moesaic, T=2", 6.0), _line("dense, T=2", 2.0))),
)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "results"
    made.mkdir()
    for one in EVERY:
        (made / f"x-{one.verb}.json").write_text(one.to_json(), encoding="utf-8")
    return made


def test_a_page_has_goals_tables_and_a_drawing_for_each_verb(folder, tmp_path):
    (tmp_path / "tried.md").write_text("## What did not pay\n\nThis.\n", encoding="utf-8")
    out = tmp_path / "docs" / "speed.md"
    written = page.write(folder, out)
    text = out.read_text("utf-8")
    assert "| fine, step: moesaic torch | of dense ≤ 1.20 | 1.50 | **missed** |" in text
    assert "| moesaic torch | 3 ± 10 % (1.50) |" in text
    assert "- transformers batched_mm: too large" in text
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        f"### {page.HEADINGS[verb]}" for verb in page.VERBS
    ]
    assert all(f"How {verb} went." in text for verb in page.VERBS)
    assert text.endswith("## What did not pay\n\nThis.\n")
    assert {path.name for path in written} == {
        "speed.md",
        *(f"speed-a-cpu-x-2-cores-{verb}.svg" for verb in page.VERBS),
    }
    assert all(f"({path.name})" in text for path in written[1:])
    assert all(path.read_text("utf-8").startswith("<?xml") for path in written[1:])


def test_a_drawing_shows_names_and_numbers():
    drawn = picture(EVERY[0])
    assert all(word in drawn for word in ("moesaic torch", "not measured", "1.5", "fine, step"))
    assert picture(replace(EVERY[0], groups=())) is None


def test_two_devices_have_a_part_each(folder):
    other = replace(EVERY[0], machine=replace(MACHINE, device="Another"))
    (folder / "y-layer.json").write_text(other.to_json(), encoding="utf-8")
    results = page.load(folder)
    text = page.words(results)
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## A CPU (x), 2 cores", "## Another"]


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(DataError) as error:
        page.load(tmp_path)
    assert str(error.value) == f"A page needs results, got none in {tmp_path}. Measure some with: make bench"


def test_the_page_in_the_docs_is_written_from_the_committed_results():
    """If this fails: ``moesaic bench page``."""
    text = page.words(page.load(RESULTS), tried=page.tried(RESULTS))
    assert (ROOT / "docs" / "speed.md").read_text("utf-8").splitlines() == text.splitlines()
    for one in page.load(RESULTS):
        assert one.machine.versions["torch"]
        if f"({page.drawing('speed', one)})" in text:
            assert (ROOT / "docs" / page.drawing("speed", one)).is_file()
