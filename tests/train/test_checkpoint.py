import errno
import os

import pytest

from moesaic.core import checkpoint
from moesaic.core.errors import CheckpointError


def save(folder, step, text="weights"):
    with checkpoint.writing(folder, step) as partial:
        (partial / "model.safetensors").write_text(text)


def save_and_fail(folder, step, error):
    with checkpoint.writing(folder, step) as partial:
        (partial / "model.safetensors").write_text("half")
        assert not (folder / f"checkpoint-{step}").exists()
        raise error


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="cut"):
        save_and_fail(tmp_path, 5, RuntimeError("cut"))
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, 5)
    checkpoint.verify(tmp_path / "checkpoint-5")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_the_newest_whole_checkpoint_is_found_and_the_damaged_ones_are_named(tmp_path):
    for step in (5, 10, 100, 20, 30):
        save(tmp_path, step)
    (tmp_path / "checkpoint-100" / "manifest.json").unlink()
    (tmp_path / "checkpoint-30" / "model.safetensors").write_text("weight")
    (tmp_path / "checkpoint-20" / "model.safetensors").write_text("wEights")
    good = checkpoint.last_good(tmp_path)
    assert (good.path, good.step) == (tmp_path / "checkpoint-10", 10)
    assert good.skipped == (
        "checkpoint-100 has no readable manifest.json: it was not written to the end.",
        "checkpoint-30/model.safetensors should be 7 bytes long and is 6.",
        "checkpoint-20/model.safetensors is not what was written: its checksum differs.",
    )
    assert checkpoint.describe_last(tmp_path) == f"the last good checkpoint is {tmp_path / 'checkpoint-10'}"


def test_a_missing_file_and_another_format_are_named(tmp_path):
    save(tmp_path, 7)
    (tmp_path / "checkpoint-7" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^checkpoint-7 lacks model\.safetensors\.$"):
        checkpoint.verify(tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-7" / "manifest.json").write_text('{"format_version": 9, "files": {}}')
    with pytest.raises(CheckpointError) as error:
        checkpoint.verify(tmp_path / "checkpoint-7")
    assert str(error.value) == "checkpoint-7 is of format 9, this version of Moesaic reads format 1."


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "rng_state.pth", "x.pkl"])
def test_pickled_files_are_refused_unread(tmp_path, name):
    save(tmp_path, 7)
    (tmp_path / "checkpoint-7" / name).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError) as error:
        checkpoint.verify(tmp_path / "checkpoint-7")
    assert str(error.value) == (
        f"checkpoint-7 holds {name}, a pickled file: Moesaic reads safetensors and JSON only. "
        "Remove it, or convert it to safetensors where you trust its origin."
    )


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    for step in (2, 10, 9):
        save(tmp_path, step)
    (tmp_path / ".partial-11").mkdir()
    checkpoint.prune(tmp_path, keep=2, saved=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_a_newer_checkpoint_that_was_passed_over_costs_the_new_one_nothing(tmp_path):
    for step in (100, 200):
        save(tmp_path, step)
    (tmp_path / "checkpoint-200" / checkpoint.MANIFEST).write_text("{")
    save(tmp_path, 150)
    checkpoint.prune(tmp_path, keep=1, saved=150)
    assert checkpoint.last_good(tmp_path).step == 150


def test_a_checkpoint_that_is_half_deleted_is_not_taken_for_whole(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, keep=2, saved=1000)
    with pytest.raises(CheckpointError):
        checkpoint.verify(tmp_path / "checkpoint-1")
    assert checkpoint.last_good(tmp_path).step == 3


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("Error while serializing: (os error 28)")]
)
def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(tmp_path, error):
    save(tmp_path, 4)
    with pytest.raises(CheckpointError) as caught:
        save_and_fail(tmp_path, 8, error)
    message = str(caught.value)
    assert message.startswith("The disk is full (")
    assert message.endswith("checkpoint-8 could not be saved; checkpoint-4 is still good. Free some space.")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 4, "first")
    save(tmp_path, 4, "again")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_text() == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_text_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    checkpoint.write_atomically(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
