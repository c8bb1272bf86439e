import errno
from pathlib import Path

import pytest

from moesaic.core.files import cannot_write, replacing_file


def test_a_file_appears_whole_and_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "text"
    with replacing_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert [item.name for item in path.parent.iterdir()] == ["text"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"old")

    def write_half():
        with replacing_file(path) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_half()
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["text"]


def test_what_could_not_be_written_is_told_with_the_reason():
    error = cannot_write("report", Path("a/b.html"), OSError(errno.ENOSPC, "No space left on device"))
    assert str(error) == (
        "The report could not be written to a/b.html: No space left on device. "
        "Free some space or give another path; what stood there before is untouched."
    )
