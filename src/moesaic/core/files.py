"""Files that are either whole or as they were, and where those are kept that can be made again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moesaic.core.errors import CheckpointError

CACHE = "MOESAIC_CACHE"
"""The environment variable that names another cache folder than ``~/.cache/moesaic``."""


def cache_folder() -> Path:
    """Where fetched models and compiled kernels are kept: ``$MOESAIC_CACHE``, or ``~/.cache/moesaic``."""
    named = os.environ.get(CACHE)
    return Path(named) if named else Path.home() / ".cache" / "moesaic"


@contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes ``path``'s place once it is complete and on the disk; until then the old one stays.

    Folders on the way are made. An error while writing leaves what stood there, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def cannot_write(what: str, path: Path, error: OSError) -> CheckpointError:
    """The error for a file that could not be written with :func:`replacing_file`."""
    return CheckpointError(
        f"The {what} could not be written to {path}: {error.strerror or error}. "
        "Free some space or give another path; what stood there before is untouched."
    )
