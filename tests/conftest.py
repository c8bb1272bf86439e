"""What every test starts from: the same seed, one thread, and reproducible random examples."""

import gc
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import torch

# Triton reads this when it is first imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from moesaic.core.files import CACHE, cache_folder
from moesaic.kernels.native import build

hypothesis.settings.register_profile(
    "moesaic", deadline=None, derandomize=True, database=None, max_examples=40, print_blob=False
)
hypothesis.settings.load_profile("moesaic")

# One thread: sums come out the same on every machine, and parallel test workers do not fight over cores.
torch.set_num_threads(1)


def _cache_without_compiled_kernels() -> tempfile.TemporaryDirectory[str]:
    """A cache of what is fetched alone: kernels that somebody has compiled on this machine change no test.

    Processes that tests start, and workers among which they are shared out, find it too.
    """
    folder = tempfile.TemporaryDirectory(prefix="moesaic-tests-")
    for kept in cache_folder().glob("*"):
        if not kept.name.startswith("native-"):
            (Path(folder.name) / kept.name).symlink_to(kept)
    os.environ[CACHE] = folder.name
    return folder


if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = _cache_without_compiled_kernels()


def pytest_collection_finish() -> None:
    """What has been imported stays: nobody looks through a million objects again, as transformers' Trainer asks for
    after every run, in half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _compiled_once(tmp_path_factory) -> build.Compiled | None:
    """The kernels in C, or None without a compiler; one that is there has to manage."""
    if not any(map(shutil.which, build.COMPILERS)):
        return None
    folder = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compiled_path", lambda: folder / "native.so")
        return build.build()


@pytest.fixture
def compiled(_compiled_once, monkeypatch) -> build.Compiled:
    """The kernels in C, where a compiler is there."""
    if _compiled_once is None:
        pytest.skip(f"NOT TESTED: needs a C compiler ({', '.join(build.COMPILERS)})")
    monkeypatch.setattr(build, "compiled", cache(lambda: _compiled_once))
    return _compiled_once
