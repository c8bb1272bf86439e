"""``moesaic native``, as a user runs it."""

import pytest

from moesaic.cli.app import run
from moesaic.core.files import CACHE
from moesaic.kernels.native import build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "kept"))
    build.compiled.cache_clear()
    yield tmp_path / "kept"
    build.compiled.cache_clear()


@pytest.mark.usefixtures("compiled")
def test_it_compiles_says_what_for_and_takes_it_away_again(cache, capsys):
    assert run(["native"]) == 0
    (made,) = cache.iterdir()
    wrote, few, many = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {made}"
    assert few == "few rows, in generation: float32 and bfloat16"
    products = build.compiled().products
    assert many.startswith("many rows: ")
    assert all(str(dtype).removeprefix("torch.") in many for dtype in products)
    assert run(["native", "--remove"]) == 0
    assert capsys.readouterr().out == f"removed {made}\n"
    assert not list(cache.iterdir())
    assert run(["native", "--remove"]) == 0
    assert capsys.readouterr().out == f"nothing to remove at {made}\n"


def test_a_compiler_that_is_not_there_is_named(cache, capsys):
    assert run(["native", "--compiler", "no-such-compiler"]) == 1
    assert capsys.readouterr().err.startswith("moesaic: a C compiler (no-such-compiler) must be there to build")
    assert not cache.exists()
