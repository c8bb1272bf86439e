import json

import numpy as np
import pytest

from moesaic.core.errors import DataError
from moesaic.lens.runs import read_run


def test_a_run_reads_back_what_training_wrote(tmp_path, random_trace, write_run):
    trace = random_trace()
    run = read_run("ours", write_run(tmp_path / "moe", trace))
    assert run.is_sparse
    assert run.is_finished
    assert run.caption == "ours"
    assert (len(run.step), len(run.eval_step)) == (40, 4)
    assert set(run.load) == set(trace.metadata.layer_names)
    assert run.load[trace.metadata.layer_names[0]].shape == (40, 4)
    np.testing.assert_allclose(run.max_over_mean[trace.metadata.layer_names[1]][:2], [2, 1.5])
    assert run.last_bits_per_byte["mean"] == pytest.approx(1.775)
    assert not read_run("twin", write_run(tmp_path / "dense", trace, dense=True)).is_sparse


def test_a_run_that_was_stopped_has_its_last_evaluation_for_a_result(tmp_path, random_trace, write_run):
    folder = write_run(tmp_path, random_trace(), steps=25)
    (folder / "summary.json").unlink()
    run = read_run("moe", folder)
    assert run.last_bits_per_byte["code"] == pytest.approx(1.5 + 1 / 20)
    assert not run.is_finished
    assert run.caption == "moe, unfinished, step 20"


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path, random_trace, write_run):
    folder = write_run(tmp_path, random_trace(), steps=5)
    path = folder / "history.jsonl"
    path.write_text(path.read_text()[:-25])
    assert read_run("moe", folder).step.tolist() == [1, 2, 3, 4]


def test_a_line_in_the_middle_that_is_no_record_is_named(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"kind": "train", "step": 1}\nhello\n{"kind": "train", "step": 3}\n')
    with pytest.raises(DataError) as error:
        read_run("moe", tmp_path)
    assert str(error.value) == (
        f'Line 2 of {tmp_path / "history.jsonl"} is no record of training (an object with "kind" and "step"). '
        "Mend or remove that line."
    )


def test_a_folder_without_history_is_named(tmp_path):
    with pytest.raises(DataError) as error:
        read_run("moe", tmp_path / "gone")
    assert str(error.value) == (
        f"A run folder needs history.jsonl, but {tmp_path / 'gone' / 'history.jsonl'} does not exist. "
        "Give the folder that training wrote, one for each run."
    )


def test_a_history_that_is_no_text_is_an_error_of_ours(tmp_path):
    (tmp_path / "history.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"history\.jsonl could not be read"):
        read_run("moe", tmp_path)


def test_a_step_written_twice_by_a_resumed_run_counts_once_as_written_last(tmp_path):
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 4.0), (2, 3.0), (1, 6.0))]
    (tmp_path / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = read_run("moe", tmp_path)
    assert (run.step.tolist(), run.loss.tolist()) == ([1, 2], [6, 3])


def test_lines_that_lack_or_garble_a_figure_leave_a_gap(tmp_path):
    lines = [
        {"kind": "train", "step": 1, "loss": None, "load": {"a": [0.5, 0.5]}, "drop_rate": {"a": 0.5}},
        {"kind": "train", "step": 2, "loss": float("inf"), "load": {"a": [1.0]}, "drop_rate": [1]},
        {"kind": "train", "step": 3, "load": {"a": "x", "b": []}},
        {"kind": "note", "step": 3},
    ]
    (tmp_path / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = read_run("moe", tmp_path)
    np.testing.assert_array_equal(run.loss, [np.nan, np.inf, np.nan])
    np.testing.assert_array_equal(run.load["a"], [[0.5, 0.5], [np.nan, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(run.drop_rate["a"], [0.5, np.nan, np.nan])
    assert set(run.load) == {"a"}
