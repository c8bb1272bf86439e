"""Compare two run folders, and start one that is killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch

from moesaic.train import history
from moesaic.train.config import TrainConfig


def assert_equal_runs(first: Path, second: Path, step: int) -> None:
    """Weights, buffers, optimizer, schedule, random generators and history of two finished runs are the same bits."""
    checkpoints = [folder / "checkpoints" / f"checkpoint-{step}" for folder in (first, second)]
    for name in ("model", "optimizer", "rng"):
        left, right = (safetensors.torch.load_file(path / f"{name}.safetensors") for path in checkpoints)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []
    for name in ("optimizer.json", "scheduler.json", "rng.json", "window.json"):
        assert checkpoints[0].joinpath(name).read_text() == checkpoints[1].joinpath(name).read_text()
    final = [safetensors.torch.load_file(folder / "model" / "model.safetensors") for folder in (first, second)]
    assert all(torch.equal(final[0][key], final[1][key]) for key in final[0] | final[1])
    assert timeless(first) == timeless(second)


def timeless(folder: Path) -> list[dict[str, object]]:
    """The history without speeds, which no two runs share."""
    lines = history.read(folder / "history.jsonl")
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


# Runs in a process of its own. KILL_AT names a function of moesaic.core.checkpoint; its n-th call ends the process as
# `kill -9` does, before the function does anything.
_SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from moesaic.train import TrainConfig, train
from moesaic.core import checkpoint
from moesaic.train import trainer

home, name, count = sys.argv[3], sys.argv[4], int(sys.argv[5])
owner = {"checkpoint": checkpoint, "trainer": trainer.MoeTrainer}[home]
real = getattr(owner, name)
calls = 0

def killing(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(owner, name, killing)
train(TrainConfig.from_settings(json.loads(sys.argv[1]), Path(sys.argv[2])))
"""


def train_and_kill(config: TrainConfig, home: str, name: str, count: int) -> None:
    """Train in another process and kill it at the ``count``-th call of a function."""
    command = [sys.executable, "-W", "error", "-c", _SCRIPT, json.dumps(config.settings()), str(config.out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, home, name, str(count)], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
