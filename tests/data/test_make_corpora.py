import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "make_corpora.py"
NOVELS = """EMMA

By Jane Austen

VOLUME I

CHAPTER I

First.

VOLUME II

CHAPTER I

Second.

FINIS

Persuasion

by

Jane Austen

(1818)

Chapter 1

Persuasion is a word that stands in the text, too.

[At this point in the first and second editions, Volume 1 ends.]

Chapter 2

Last.

A NOTE ON THE TEXT

Somebody else's.
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, str]]]:
    (tmp_path / "novels.gz").write_bytes(gzip.compress(NOVELS.encode()))
    questions = [("add", "1 + 1?", "2"), ("mul", "2 * 3?", "6"), ("add", "1 + 1?", "2")]
    lines = (
        json.dumps({"topic": kind, "text": f"Question: {it}\nAnswer: {answer}\n"}) for kind, it, answer in questions
    )
    (tmp_path / "questions.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    files = ["--novels", str(tmp_path / "novels.gz"), "--questions", str(tmp_path / "questions.gz")]
    monkeypatch.setattr(sys, "argv", ["make_corpora.py", *files, "--out", str(tmp_path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return {
        name: [json.loads(line) for line in gzip.decompress((tmp_path / f"{name}.jsonl.gz").read_bytes()).splitlines()]
        for name in ("literature", "mathematics")
    }


def test_novels_become_chapters_without_what_editors_added(rows: dict[str, list[dict[str, str]]]):
    assert rows["literature"] == [
        {"group": "Emma", "title": "Emma, chapter 1", "text": "CHAPTER I\n\nFirst.\n"},
        {"group": "Emma", "title": "Emma, chapter 2", "text": "CHAPTER I\n\nSecond.\n"},
        {
            "group": "Persuasion",
            "title": "Persuasion, chapter 1",
            "text": "Chapter 1\n\nPersuasion is a word that stands in the text, too.\n",
        },
        {"group": "Persuasion", "title": "Persuasion, chapter 2", "text": "Chapter 2\n\nLast.\n"},
    ]


def test_each_question_ships_once(rows: dict[str, list[dict[str, str]]]):
    assert rows["mathematics"] == [
        {"group": "1 + 1?", "title": "add", "text": "Question: 1 + 1?\nAnswer: 2\n"},
        {"group": "2 * 3?", "title": "mul", "text": "Question: 2 * 3?\nAnswer: 6\n"},
    ]
