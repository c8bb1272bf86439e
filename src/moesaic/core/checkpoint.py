"""Checkpoints that are either whole or absent.

A checkpoint is written to a sibling folder, its manifest last, flushed to the disk and then renamed. A reader checks
every file against the manifest, so that one cut short or damaged later is recognised and an older one is taken.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moesaic.core.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
PREFIX = "checkpoint-"
_PARTIAL = ".partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Formats that run code when they are read.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class DiskFullError(CheckpointError):
    """A checkpoint that did not fit on the disk; the older ones are untouched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastGood:
    """The newest whole checkpoint, and why newer ones were passed over.

    Attributes:
        path: its folder; None if there is no whole one.
        step: its optimizer step; 0 if there is none.
        skipped: one line for each newer checkpoint that is not whole.
    """

    path: Path | None
    step: int
    skipped: tuple[str, ...]


@contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """Give an empty folder to write a checkpoint into, and put it in place as ``checkpoint-<step>`` afterwards.

    Raises:
        DiskFullError: if the disk is full; nothing is left of the new checkpoint, the older ones stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial, final = partial_folder(folder, step), folder / f"{PREFIX}{step}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        seal(partial, step)
        _put_in_place(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise DiskFullError(_full_message(folder, step)) from error
        raise


def partial_folder(folder: Path, step: int) -> Path:
    """Give the folder that a checkpoint is written to before it is renamed; other ranks write there too."""
    return folder / f"{_PARTIAL}{step}"


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error says that a disk or a quota is full (safetensors wraps the system's error in its own)."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(f"os error {code}" in str(error) for code in _FULL)


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: naming the first file that is missing, cut short, changed, or of a kind that is never read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, dict[str, object]] = manifest["files"]
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} has no readable {MANIFEST}: it was not written to the end.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path.name} is of format {version}, this version of Moesaic reads format {FORMAT_VERSION}."
        )
    refuse_pickles(path)
    for name, wanted in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path.name} lacks {name}.")
        if file.stat().st_size != wanted["size_bytes"]:
            raise CheckpointError(
                f"{path.name}/{name} should be {wanted['size_bytes']} bytes long and is {file.stat().st_size}."
            )
        if _sha256(file) != wanted["sha256"]:
            raise CheckpointError(f"{path.name}/{name} is not what was written: its checksum differs.")


def refuse_pickles(path: Path) -> None:
    """Refuse a folder that holds pickled files, which could run code when read.

    Raises:
        CheckpointError: naming the first one.
    """
    for file in sorted(path.iterdir()):
        if file.suffix in PICKLES:
            raise CheckpointError(
                f"{path.name} holds {file.name}, a pickled file: Moesaic reads safetensors and JSON only. "
                "Remove it, or convert it to safetensors where you trust its origin."
            )


def last_good(folder: Path) -> LastGood:
    """Find the newest whole checkpoint of a folder."""
    skipped = []
    for step, path in sorted(_steps(folder), reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return LastGood(path=path, step=step, skipped=tuple(skipped))
    return LastGood(path=None, step=0, skipped=tuple(skipped))


def prune(folder: Path, keep: int, *, saved: int) -> None:
    """Delete all but ``keep`` checkpoints up to the one just saved, and what is left of unfinished ones.

    Later ones, which a resumed run passed over as damaged, do not count: they must not cost a good one its place.
    """
    for _, path in sorted((step, path) for step, path in _steps(folder) if step <= saved)[:-keep]:
        # The manifest goes first: a deletion cut short leaves a folder that nobody takes for whole.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def describe_last(folder: Path) -> str:
    """Say in a few words which checkpoint of a folder can be gone back to."""
    found = sorted(_steps(folder), reverse=True)
    is_ours = any((path / MANIFEST).exists() for _, path in found)
    for _, path in found:
        # A plain transformers Trainer writes no manifest; its newest folder is the best that can be said.
        if not is_ours or _is_whole(path):
            return f"the last good checkpoint is {path}"
    return "no checkpoint was saved before that"


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: readers see the old text or the new one, never a part."""
    partial = path.with_name(f"{_PARTIAL}{path.name}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Give an empty sibling folder to fill, and put it with a manifest in the place of ``final`` afterwards."""
    partial = final.with_name(f"{_PARTIAL}{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        seal(partial, None)
        _put_in_place(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _put_in_place(partial: Path, final: Path) -> None:
    old = final.with_name(f"{_PARTIAL}old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    numbers = ((path.name.removeprefix(PREFIX), path) for path in folder.glob(f"{PREFIX}*") if path.is_dir())
    return [(int(number), path) for number, path in numbers if number.isdecimal()]


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def seal(partial: Path, step: int | None) -> None:
    """Write the manifest of all files of a folder, and flush everything to the disk."""
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    listed = {
        str(file.relative_to(partial)): {"size_bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": listed}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    flush(partial)


def flush(folder: Path) -> None:
    """See that every file of a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _full_message(folder: Path, step: int) -> str:
    good = last_good(folder)
    kept = f"{good.path.name} is still good" if good.path else "no earlier checkpoint exists"
    free_mib = shutil.disk_usage(folder).free / 2**20
    return (
        f"The disk is full ({free_mib:.1f} MiB free at {folder}): {PREFIX}{step} could not be saved; {kept}. "
        "Free some space."
    )
