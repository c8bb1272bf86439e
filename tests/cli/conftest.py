"""A tiny finished run, trained once through the command line."""

import pytest

from moesaic.cli.app import run
from tests.train.conftest import write_text

SIZES = ["--width=16", "--layers=2", "--heads=2", "--hidden=16", "--num-experts=4", "--context=24", "--batch-size=2"]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    assert run(["train", "--data", str(text), "--out", str(out), "--steps=6", "--twin", "--no-report", *SIZES]) == 0
    return out
