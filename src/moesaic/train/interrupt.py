"""Ctrl-C during training: finish the step, save, stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.core.errors import MoesaicError
from moesaic.train import ranks


class TrainingStoppedError(MoesaicError):
    """Training was asked to stop and did, with everything saved."""


class InterruptCallback(TrainerCallback):
    """On SIGINT or SIGTERM, let the running step finish, save a checkpoint and end training.

    A second signal ends the process at once, as it would have without this callback. Works in any
    ``transformers.Trainer``; outside the main thread, where Python delivers no signals, it does nothing.

    Attributes:
        requested: a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start listening."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if a signal has come."""
        # A signal reaches ranks at different steps; they stop at the same one.
        self.requested = ranks.any_of(self.requested, args.device)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if a signal has come during an evaluation, which ends a step."""
        self.on_step_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop listening."""
        self.restore()

    def restore(self) -> None:
        """Put the handlers back that were there before; for training that ends with an exception."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.restore()
