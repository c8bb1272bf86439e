"""The page of the experiment says what its figures say, and the committed one is what its figures give."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic import lab
from moesaic.cli.app import run
from moesaic.core.errors import BackendError
from moesaic.lab.pretrained import QUICK, Story, curves, tiny_model, words, write
from moesaic.lab.pretrained.page import against
from moesaic.lab.pretrained.smol import FOLDER
from moesaic.lab.pretrained.starts import ALONE, DENSE, PAIRED, SPLIT

DOCS = Path(__file__).parents[2] / "docs"
RECEIPT = {"line": "…", "largest_logit": 9.5, "probe_tokens": 120, "notes": []}


def look(tokens, mean):
    return [tokens, {"prose": mean - 0.5, "sums": mean + 0.5, "mean": mean}, [9.0, 9.0, 9.0]]


@pytest.fixture
def story():
    """Two prose documents of 10 bytes and one sum of 20; figures that can be worked out by hand."""
    finals = {
        DENSE: (20.0, 10.0, 60.0),
        ALONE: (18.0, 8.0, 58.0),
        PAIRED: (21.0, 13.0, 60.0),
        SPLIT: (20.0, 10.0, 60.0),
    }
    figures = {"total_params": 4e6, "active_params": 2e6, "tokens_per_s": 123.0}
    answers = {DENSE: "1100", f"{DENSE}, trained": "1000", f"{ALONE}, trained": "1110"}
    return Story(
        plan=QUICK,
        source=FOLDER,
        machine="an abacus",
        receipts={
            ALONE: {**RECEIPT, "largest_logit_difference": 2e-6, "promised": 9e-5},
            SPLIT: {**RECEIPT, "largest_logit_difference": 2.5, "promised": None},
        },
        sizes=dict.fromkeys(finals, figures),
        looks={
            DENSE: [look(0, 2.0), look(64, 1.8), look(128, 1.6)],
            ALONE: [look(0, 2.0), look(64, 1.7), look(128, 1.5)],
            PAIRED: [look(0, 2.0), look(64, 1.7), look(128, 1.7)],
        },
        looked_at=(("prose", 10), ("prose", 10), ("sums", 20)),
        documents=(("prose", 10), ("prose", 10), ("sums", 20)),
        bits={DENSE: (30.0, 30.0, 90.0)} | {f"{name}, trained": bits for name, bits in finals.items()},
        answers=dict.fromkeys(("MMLU", "ARC-Easy"), answers),
        smaller={f"{PAIRED}, whole": (10.0, 10.0, 40.0), f"{PAIRED}, pruned": (12.0, 12.0, 40.0)},
    )


def test_the_page_says_what_the_figures_say(story):
    page = words(story, "page.svg").splitlines()
    for line in (
        "- Machine: an abacus.",
        "| upcycled, one copy | 4.0 M | 2.0 M | 2.0e-06 | 8.6e-04 |",
        "| split | 4.0 M | 2.0 M | 2.5e+00 | – |",
        "![Bits per byte of each model while it is trained, by domain](page.svg)",
        "Bits per byte on 3 held-out documents of 40 bytes in all:",
        "| dense | 3.0000 | 4.5000 | 3.7500 | – |",
        "| dense, trained | 1.5000 | 3.0000 | 2.2500 | 123 |",
        "| upcycled, one copy, trained | 1.3000 | 2.9000 | 2.1000 | 123 |",
        "| dense | 50.0 ± 25.0 % | 50.0 ± 25.0 % |",
        "| dense, trained, less dense | −25.0 ± 25.0 (p = 1.00) | −25.0 ± 25.0 (p = 1.00) |",
        "| upcycled, one copy, trained, less dense, trained | +50.0 ± 28.9 (p = 0.50) | +50.0 ± 28.9 (p = 0.50) |",
        "| upcycled, two copies, whole | 1.5000 | – |",
        "| upcycled, two copies, pruned | 1.6000 | +0.1000 |",
    ):
        assert line in page


def test_the_page_says_who_ends_below_the_dense_model_and_since_when(story):
    page = words(story, "page.svg")
    assert "*upcycled, one copy* ends 0.1500 bits per byte (which is not more than two standard errors) below" in page
    assert "below the dense model; it was below at every look from 64 tokens on." in page
    # Below in between, above at the end.
    assert re.search(r"\*upcycled, two copies\* ends 0\.1000 bits per byte [^.;]*above the dense model\.", page)
    assert against(story, SPLIT)["mean"].mean == 0


def test_an_error_that_one_document_does_not_tell_is_left_out(story):
    assert "| upcycled, one copy | −0.2000 ± 0.0000 | −0.1000 | −0.1500 |" in words(story, "page.svg").splitlines()


def test_the_page_tells_what_is_missing(story):
    said = next(line for line in words(story, "page.svg").splitlines() if line.startswith("- Not measured yet: "))
    assert "every layer upcycled; every layer split; dense, twice the rate, trained; " in said
    assert "questions to split, trained; " in said
    assert said.endswith("upcycled, two copies, trained, pruned; upcycled, two copies, trained, merged.")
    assert "upcycled, two copies, pruned" not in said


def test_a_trial_is_not_taken_for_the_real_thing(story):
    page = words(replace(story, source="dense"), "page.svg")
    assert page.startswith("# A trial of all stages on dense,")
    assert words(story, "page.svg").startswith("# Real weights\n")


def test_a_story_that_has_just_begun_has_no_empty_sections(story):
    page = words(Story(plan=QUICK, source=FOLDER, machine="an abacus"), "page.svg")
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## Made a mixture",
        "## What this does not show",
    ]


def test_page_picture_and_figures_lie_side_by_side(story, tmp_path):
    written = write(story, tmp_path / "a.md")
    assert [path.name for path in written] == ["a.md", "a.svg", "a.json"]
    drawing = (tmp_path / "a.svg").read_text()
    for shown in (DENSE, ALONE, PAIRED, "prose", "sums", "mean of the domains", "bits per byte"):
        assert shown in drawing
    assert Story.load(tmp_path / "a.json") == story
    assert write(story, tmp_path / "b.md")[1].read_text() == drawing


def test_without_matplotlib_no_picture_is_begun(monkeypatch):
    monkeypatch.setattr(curves, "find_spec", lambda _name: None)
    with pytest.raises(BackendError, match=r"needs matplotlib, .*pip install 'moesaic\[lab\]'"):
        curves.needs_curves()


def test_the_page_in_the_docs_is_what_its_figures_give():
    """If this fails: ``moesaic lab pretrained --out docs/real-weights.md`` in the folder of the runs."""
    story = Story.load(DOCS / "real-weights.json")
    assert (DOCS / "real-weights.md").read_text("utf-8").splitlines() == words(story, "real-weights.svg").splitlines()
    drawing = (DOCS / "real-weights.svg").read_text("utf-8")
    assert all(name in drawing for name in story.looks)


def test_the_code_of_the_page_runs(story, tmp_path, monkeypatch):
    """On a tiny model in the real one's place."""
    code = re.findall(r"^```\{\.python\}\n(.*?)^```", words(story, "page.svg"), re.MULTILINE | re.DOTALL)
    monkeypatch.setattr(lab.pretrained, "smollm2", lambda: tiny_model(tmp_path / "dense"))
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(96).view(3, 32)
    namespace = {"texts": ["one and one is two. " * 9, "a page of a novel"], "batches": [{"input_ids": ids}]}
    for block in code:
        exec(compile(block, "page.md", "exec"), namespace)
    made = {path.name for path in tmp_path.iterdir() if (path / "receipt.json").is_file()}
    assert made == {"one-copy", "two-copies", "split", "pruned", "merged"}


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch, story):
    """Stands in for the experiment; keeps what it was asked for."""
    asked = {}

    class Told:
        def __init__(self, source, work, **arguments):
            asked.update(arguments, source=source, work=work)

        def run(self):
            return story

    monkeypatch.setattr(lab.pretrained, "Experiment", Told)
    return asked


def test_the_command_writes_the_page_and_prints_the_figures(told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab.pretrained, "smollm2", lambda: tmp_path / "model")
    out = tmp_path / "new" / "page.md"
    arguments = ["--work", str(tmp_path / "work"), "--questions", str(tmp_path), "--steps=8", "--json"]
    assert run(["lab", "pretrained", "--out", str(out), *arguments]) == 0
    assert (told["source"], told["work"], told["questions"]) == (tmp_path / "model", tmp_path / "work", tmp_path)
    assert (told["plan"].steps, told["plan"].layers, told["corpus"]) == (8, tuple(range(20, 30)), None)
    assert json.loads(capsys.readouterr().out)["machine"] == "an abacus"
    assert sorted(path.name for path in out.parent.iterdir()) == ["page.json", "page.md", "page.svg"]


def test_quick_makes_its_own_model_and_fetches_nothing(told, tmp_path, monkeypatch):
    monkeypatch.setattr(lab.pretrained, "smollm2", lambda: pytest.fail("it was fetched"))
    assert run(["lab", "pretrained", "--quick", "--work", str(tmp_path / "w"), "--out", str(tmp_path / "a.md")]) == 0
    assert (told["source"], told["plan"]) == (tmp_path / "w" / "dense", QUICK)
    assert (tmp_path / "w" / "dense" / "config.json").is_file()
    assert sum(document.num_bytes for document in told["corpus"].train) <= 60_000
