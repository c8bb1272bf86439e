"""A corpus of two made-up languages, small enough to train on in a second."""

import random
from pathlib import Path

import pytest

from moesaic.train import TrainConfig


def write_text(folder: Path) -> Path:
    """Two domains that share no word, a few hundred bytes a document."""
    chance = random.Random(0)
    words = ["".join(chance.choice("abcdefghij") for _ in range(chance.randint(2, 7))) for _ in range(40)]
    for domain, own in (("north", words[:20]), ("south", words[20:])):
        (folder / domain).mkdir(parents=True)
        for index in range(12):
            lines = [" ".join(chance.choice(own) for _ in range(20)) for _ in range(4)]
            (folder / domain / f"{index}.txt").write_text("\n\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "corpus")


def small(out: Path, text: Path, **changes: object) -> TrainConfig:
    """A run that takes a fraction of a second."""
    numbers = {"width": 16, "layers": 2, "heads": 2, "hidden": 16, "num_experts": 4, "context": 24}
    length = {"steps": 8, "batch_size": 2, "grad_accumulation": 2, "save_every": 3, "eval_every": 4, "log_every": 2}
    return TrainConfig(out=out, **{"data": str(text), **numbers, **length, **changes})


@pytest.fixture
def tiny(text, tmp_path):
    """Makes configs of runs that take a fraction of a second."""
    return lambda out="run", **changes: small(tmp_path / out, text, **changes)
