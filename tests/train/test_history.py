import json

import pytest

from moesaic.train import history


def lines(*steps):
    return [{"kind": "train", "step": step, "tokens": 10 * step, "tokens_per_s": 5.0} for step in steps]


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    write(tmp_path / "history.jsonl", lines(1, 2), tail='{"kind": "tr')
    assert history.read(tmp_path / "history.jsonl") == lines(1, 2)
    assert history.read(tmp_path / "absent.jsonl") == []


def test_what_came_after_the_checkpoint_is_dropped(tmp_path):
    path = tmp_path / "history.jsonl"
    write(path, [*lines(2, 4), {"kind": "eval", "step": 4, "tokens": 40}, *lines(6)], tail='{"kind"')
    history.truncate(path, 4)
    assert history.read(path) == [*lines(2, 4), {"kind": "eval", "step": 4, "tokens": 40}]
    history.truncate(path, 0)
    assert path.read_text() == ""


def test_the_speed_of_a_run_is_all_tokens_over_all_time():
    rows = [
        {"kind": "train", "tokens": 100, "tokens_per_s": 50.0},
        {"kind": "eval", "tokens": 100},
        {"kind": "train", "tokens": 400, "tokens_per_s": 100.0},
    ]
    assert history.tokens_per_s(rows) == pytest.approx(400 / (2 + 3))
    assert history.tokens_per_s([]) is None
