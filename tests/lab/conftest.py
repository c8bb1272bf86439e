"""Experiments small enough for a test: a few steps of a narrow model on bytes."""

import pytest

from moesaic.lab import Setup


@pytest.fixture(scope="session")
def tiny():
    return Setup(
        backbone="llama",
        width=32,
        layers=1,
        num_experts=4,
        active_hidden=96,
        context=32,
        batch_size=2,
        steps=2,
        lr=1e-3,
        tokenizer="bytes",
    )


@pytest.fixture(autouse=True)
def _little_to_read(monkeypatch):
    """Evaluations read a handful of blocks: all held-out text would take longer than the training."""
    from moesaic.lab import small

    whole = small.train_config

    def config(*args):
        import dataclasses

        return dataclasses.replace(whole(*args), eval_tokens=64)

    monkeypatch.setattr(small, "train_config", config)
    monkeypatch.setattr("moesaic.lab.text.train_config", config)
