"""Studies of what experts take: planted structure is found, and both run from command to page."""

import gzip
import json

import numpy as np
import pytest

from moesaic.cli.app import run
from moesaic.core.errors import DataError
from moesaic.lab.studies.mixed_text import write_three_domains
from moesaic.lab.studies.mmlu import read_questions, standouts
from moesaic.telemetry.trace import RoutingTrace, TraceMetadata

QUESTIONS, TOKENS, EXPERTS = 240, 20, 4


def trace_of_subjects(planted: bool) -> RoutingTrace:
    """One layer, six subjects; if planted, half the tokens of the third go to its last expert."""
    rng = np.random.default_rng(0)
    sequence = np.repeat(np.arange(QUESTIONS), TOKENS)
    subject = sequence % 6
    expert = rng.integers(EXPERTS, size=len(sequence))
    if planted:
        expert = np.where((subject == 2) & (rng.random(len(sequence)) < 0.5), EXPERTS - 1, expert)
    zeros = np.zeros(len(sequence))
    return RoutingTrace(
        metadata=TraceMetadata(
            model="m", layer_names=("layers.0",), num_experts=(EXPERTS,), top_k=1, domains=tuple("abcdef")
        ),
        sequence=sequence,
        position=np.tile(np.arange(TOKENS), QUESTIONS),
        layer=zeros,
        choice=zeros,
        token_id=zeros,
        expert=expert,
        weight=zeros + 1,
        score=zeros + 1,
        kept=np.ones(len(sequence), dtype=bool),
        domain=subject,
    )


def test_a_subject_that_has_an_expert_stands_out_and_no_other_does():
    found, bound = standouts(trace_of_subjects(planted=True), 0)
    (one,) = found
    assert (one.subject, one.expert, one.count) == ("c", EXPERTS - 1, QUESTIONS // 6 * TOKENS)
    # A half at once, and a quarter of the other half.
    assert one.share == pytest.approx(0.625, abs=0.06)
    assert one.average == pytest.approx((5 * 0.25 + 0.625) / 6, abs=0.02)
    assert one.share - one.average > 2 * bound


def test_no_subject_stands_out_among_choices_at_random():
    assert standouts(trace_of_subjects(planted=False), 0)[0] == []


def test_three_domains_have_as_many_bytes_each_and_are_drawn_alike_twice(tmp_path):
    for name, rows in {
        "wikipedia_en": [{"text": f"Article {n} about a number. " * 5} for n in range(200)],
        "dm_mathematics": [{"text": f"Question: {n} + {n}?\nAnswer: {2 * n}\n"} for n in range(2000)],
    }.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    drawn = [write_three_domains(tmp_path, tmp_path / name, num_bytes=10_000).read_text() for name in ("a", "b")]
    assert drawn[0] == drawn[1]
    sizes: dict[str, int] = {}
    for line in drawn[0].splitlines():
        row = json.loads(line)
        sizes[row["domain"]] = sizes.get(row["domain"], 0) + len(row["text"].encode())
    assert set(sizes) == {"wikipedia", "code", "mathematics"}
    assert all(size >= 10_000 for size in sizes.values())
    assert sizes["wikipedia"] < 10_200


def test_a_folder_without_the_texts_is_told_by_its_file(tmp_path):
    with pytest.raises(DataError, match=r"The study needs .*wikipedia_en\.jsonl\.gz, gzipped JSON lines"):
        write_three_domains(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"The study needs .*mmlu\.jsonl\.gz with a domain, a split, a question"):
        read_questions(tmp_path, of_each=1)


@pytest.mark.slow
def test_both_studies_run_from_command_to_page(tmp_path):
    assert run(["lab", "three-domains", "--quick", "--work", str(tmp_path), "--out", str(tmp_path / "three.md")]) == 0
    page = (tmp_path / "three.md").read_text()
    figures = json.loads((tmp_path / "three.json").read_text())
    for name, figure in figures["runs"].items():
        assert f"{figure['bits_per_byte']['mean']:.4f}" in page, name
    assert np.shape(figures["runs"]["loss-free"]["times_chance"]) == (2, 3, 4)

    rows = [
        {"domain": subject, "split": split, "question": f"{word} {n}?", "choices": ["1", "2", "3", "4"]}
        for subject, word in (("arithmetic", "How much is"), ("history", "Who came in"))
        for split in ("test", "dev")
        for n in range(12)
    ]
    with gzip.open(tmp_path / "mmlu.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    model = tmp_path / "loss-free"
    arguments = ["--model", str(model), "--data", str(tmp_path), "--of-each", "10", "--out", str(tmp_path / "mmlu.md")]
    assert run(["lab", "mmlu", *arguments]) == 0
    page = (tmp_path / "mmlu.md").read_text()
    figures = json.loads((tmp_path / "mmlu.json").read_text())
    assert "20 test questions" in page
    assert figures["domains"] == ["arithmetic", "history"]
    for layer in figures["layers"]:
        assert sum(layer["load"]) == pytest.approx(1)
        assert len(layer["tokens"]["faithful"]) > 0
