"""``history.jsonl``: one line for each log entry and evaluation of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.core.checkpoint import write_atomically
from moesaic.train.meter import RoutingMeter

Line: TypeAlias = dict[str, Any]
Sink: TypeAlias = Callable[[Line], None]


class HistoryCallback(TrainerCallback):
    """Write a line of ``history.jsonl`` whenever the Trainer logs or evaluates.

    Works in any ``transformers.Trainer``. Loads, drop rates and entropies are those of the step that ends with the
    log entry, summed over its micro-batches and over all ranks.

    Args:
        path: the file, appended to.
        tokens_per_step: tokens that all ranks together read in one optimizer step.
        sinks: also called with each line: a progress bar, a TensorBoard.
    """

    def __init__(self, path: Path, *, tokens_per_step: int, sinks: Sequence[Sink] = ()):
        self.path = path
        self.tokens_per_step = tokens_per_step
        self.sinks = tuple(sinks)
        self._meter: RoutingMeter | None = None
        self._clock = _Clock()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._clock.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure the routing of steps that will be logged, and of no others."""
        self.close()
        coming = state.global_step + 1
        if coming % max(1, state.logging_steps) == 0 or coming == state.max_steps:
            self._meter = RoutingMeter(model)
            self._meter.open()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop measuring: the step's forwards are done."""
        if self._meter is not None:
            self._meter.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the last step too."""
        self._clock.step()
        if state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a training line."""
        if not logs or "loss" not in logs:
            return
        line: Line = {
            "kind": "train",
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "loss": logs["loss"],
            "lr": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_s": self._clock.tokens_per_s(self.tokens_per_step),
        }
        self._write({**line, **(self._meter.read() if self._meter is not None else {})}, state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write an evaluation line."""
        start = "eval_bits_per_byte_"
        bits = {name.removeprefix(start): value for name, value in (metrics or {}).items() if name.startswith(start)}
        if bits:
            tokens = state.global_step * self.tokens_per_step
            self._write({"kind": "eval", "step": state.global_step, "tokens": tokens, "bits_per_byte": bits}, state)
        self._clock.skip()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the time that saving took out of the speed."""
        self._clock.skip()

    def close(self) -> None:
        """Stop looking at the routers; for training that ends with an exception."""
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    def _write(self, line: Line, state: TrainerState) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for sink in self.sinks:
                sink(line)


class _Clock:
    """Time spent on steps, that of evaluations and saves left out."""

    def __init__(self) -> None:
        self._mark = 0.0
        self._spent_s = 0.0
        self._steps = 0

    def start(self) -> None:
        self._mark, self._spent_s, self._steps = time.perf_counter(), 0.0, 0

    def step(self) -> None:
        now = time.perf_counter()
        self._spent_s += now - self._mark
        self._mark = now
        self._steps += 1

    def skip(self) -> None:
        self._mark = time.perf_counter()

    def tokens_per_s(self, tokens_per_step: int) -> float:
        """Give the speed since the last call."""
        speed = self._steps * tokens_per_step / max(self._spent_s, 1e-9)
        self._spent_s, self._steps = 0.0, 0
        return speed


def read(path: Path) -> list[Line]:
    """Read the lines of a history; a last line that was cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if isinstance(line, dict):
            lines.append(line)
    return lines


def truncate(path: Path, step: int) -> None:
    """Drop what was written after ``step``, so that a resumed run does not write it twice."""
    lines = [line for line in read(path) if line.get("step", 0) <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def tokens_per_s(lines: Sequence[Line]) -> float | None:
    """Give the speed over a whole run, resumed or not: all tokens over the time that their steps took."""
    tokens, spent_s, before = 0, 0.0, 0
    for line in lines:
        if line["kind"] == "train":
            new = line["tokens"] - before
            tokens, before = tokens + new, line["tokens"]
            spent_s += new / line["tokens_per_s"]
    return tokens / spent_s if spent_s else None
