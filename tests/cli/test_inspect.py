import json

import pytest

from moesaic import RoutingTrace
from moesaic.cli.app import run
from tests.lens.conftest import random_trace


@pytest.fixture(name="quick", autouse=True)
def _quick(monkeypatch):
    """No PNG files: what a page holds is tested with the page."""
    monkeypatch.setattr("moesaic.lens.drawing._png", lambda *_: b"no picture")


@pytest.fixture(name="trace_file")
def _trace_file(tmp_path):
    return random_trace(lean=1.0).save(tmp_path / "some.trace.parquet")


def test_a_trace_file_is_drawn_as_it_is(trace_file, capsys):
    assert run(["inspect", str(trace_file), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] == 12 * 32
    assert figures["trace"] == str(trace_file)
    page = trace_file.with_name("some.trace.html")
    assert figures["report"] == str(page)
    assert "runs/toy" in page.read_text("utf-8")
    assert {path.name for path in trace_file.parent.iterdir()} == {
        "some.trace.parquet", "some.trace.html", "some.trace-figures",
    }  # fmt: skip


def test_a_sample_keeps_whole_sequences(trace_file, tmp_path, capsys):
    assert run(["inspect", str(trace_file), "--sample=0.5", "--out", str(tmp_path / "x.html"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    kept = RoutingTrace.load(trace_file, sample=0.5).num_tokens
    assert 0 < kept < 12 * 32
    assert kept % 32 == 0
    assert figures["tokens"] == kept


def test_two_traces_are_put_side_by_side(trace_file, tmp_path):
    other = random_trace(lean=3.0, model="runs/other").save(tmp_path / "other.parquet")
    page = tmp_path / "both.html"
    assert run(["inspect", str(trace_file), "--compare", str(other), "--out", str(page)]) == 0
    text = page.read_text("utf-8")
    assert "Side by side" in text
    assert "chance, runs/other" in text


def test_text_for_a_trace_is_refused_with_a_way_out(trace_file, capsys):
    assert run(["inspect", str(trace_file), "--data", "builtin"]) == 2
    assert capsys.readouterr().err == (
        f"moesaic: {trace_file} is a trace and has read its text already, but --data names another. Leave --data out.\n"
    )


def test_a_file_that_is_no_trace_is_told_by_name(tmp_path, capsys):
    path = tmp_path / "notes.parquet"
    path.write_text("not parquet")
    assert run(["inspect", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0.0", "1.5"])
def test_a_share_that_is_none_is_refused(trace_file, share, capsys):
    assert run(["inspect", str(trace_file), "--sample", share]) == 2
    assert f"sample must be above 0 and at most 1, got {share}." in capsys.readouterr().err
