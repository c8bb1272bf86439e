"""Results as JSON and as tables."""

import json

import pytest

from moesaic.bench.machine import Machine, machine
from moesaic.bench.result import Goal, Group, Line, Result
from moesaic.bench.show import columns, markdown, number, rows
from moesaic.core.errors import CheckpointError

LINES = (
    Line(
        name="mine",
        samples=(1.0, 2.0, 3.0),
        ratios=(0.5, 1.0, 1.5),
        goals=(Goal(what="of it", bound=1.2, at_most=True, value=1.0),),
    ),
    Line(name="gone", note="cannot | be"),
)
GROUP = Group(title="a case", unit="ms", limit="it", lines=LINES, facts={"T": 4, "case": "a"})
MACHINE = Machine(device="A CPU (x), 2 cores", threads=2, versions={"torch": "2"}, date="2026-01-02", commit="abc")
RESULT = Result(verb="layer", machine=MACHINE, rounds=3, about=("So.",), groups=(GROUP,))


def test_a_result_comes_back_from_json(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(RESULT.to_json(), encoding="utf-8")
    assert Result.from_json(path) == RESULT


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"form": 99}', RESULT.to_json().replace('"verb"', '"word"')])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "one.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"could not be read from .*one\.json.* Measure again with --out\."):
        Result.from_json(path)


def test_numbers_are_kept_to_four_digits():
    line = Line(name="x", samples=(1.23456789,))
    group = Group(title="t", unit="ms", lines=(line,))
    text = Result(verb="layer", machine=MACHINE, rounds=5, about=(), groups=(group,)).to_json()
    assert json.loads(text)["groups"][0]["lines"][0]["samples"] == [1.235]


@pytest.mark.parametrize(
    ("at_most", "value", "said"),
    [
        (True, 1.13, "of dense ≤ 1.20: 1.13 met"),
        (True, 1.27, "of dense ≤ 1.20: 1.27 missed"),
        (False, 1.27, "of dense ≥ 1.20: 1.27 met"),
        (False, 1.13, "of dense ≥ 1.20: 1.13 missed"),
    ],
)
def test_a_goal_says_whether_it_is_met(at_most, value, said):
    assert str(Goal(what="of dense", bound=1.2, at_most=at_most, value=value)) == said


def test_a_table_has_a_row_for_each_line_and_says_why_one_was_not_measured():
    assert columns(GROUP) == ("", "ms", "lowest to highest", "of it", "goal", "")
    assert rows(GROUP) == [
        ("mine", "2", "1 to 3", "1.00", "of it ≤ 1.20: 1.00 met", ""),
        ("gone", "–", "", "", "", "cannot | be"),
    ]
    assert markdown(GROUP)[-1] == "| gone | – |  |  |  | cannot \\| be |"


def test_columns_without_a_word_are_left_out():
    plain = Group(title="t", unit="MiB", lines=(Line(name="x", samples=(2.0,)),))
    assert markdown(plain) == ["|  | MiB |", "|---|---:|", "| x | 2 |"]


def test_numbers_are_short():
    assert [number(value) for value in (0.12345, 12.345, 123.45, 12345.6)] == ["0.123", "12.3", "123", "12,346"]


def test_this_machine_says_who_it_is():
    import torch

    mine = machine(torch.device("cpu"))
    assert mine.device.endswith(" cores")
    assert mine.versions["torch"] == torch.__version__
    assert mine.threads == torch.get_num_threads()
    assert MACHINE.slug == "a-cpu-x-2-cores"
