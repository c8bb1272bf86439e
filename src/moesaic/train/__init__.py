"""Training on transformers.Trainer: losses, controllers, telemetry, safe checkpoints, resume."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.train.balance import BalanceCallback
    from moesaic.train.config import TrainConfig
    from moesaic.train.evaluate import Evaluation, Evaluator
    from moesaic.train.finite import FiniteGuard, NotFiniteError
    from moesaic.train.history import HistoryCallback
    from moesaic.train.interrupt import InterruptCallback, TrainingStoppedError
    from moesaic.train.load import Trained, load_trained
    from moesaic.train.progress import ProgressCallback
    from moesaic.train.run import resume, train
    from moesaic.train.trainer import MoeTrainer

_HOME = {
    "BalanceCallback": "balance",
    "Evaluation": "evaluate",
    "Evaluator": "evaluate",
    "FiniteGuard": "finite",
    "HistoryCallback": "history",
    "InterruptCallback": "interrupt",
    "MoeTrainer": "trainer",
    "NotFiniteError": "finite",
    "ProgressCallback": "progress",
    "TrainConfig": "config",
    "Trained": "load",
    "TrainingStoppedError": "interrupt",
    "load_trained": "load",
    "resume": "run",
    "train": "run",
}

__all__ = [
    "BalanceCallback",
    "Evaluation",
    "Evaluator",
    "FiniteGuard",
    "HistoryCallback",
    "InterruptCallback",
    "MoeTrainer",
    "NotFiniteError",
    "ProgressCallback",
    "TrainConfig",
    "Trained",
    "TrainingStoppedError",
    "load_trained",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moesaic.train.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
