"""What a person sees while a model trains."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.train.history import Line


class ProgressCallback(TrainerCallback):
    """A progress bar with loss, tokens/s, load imbalance and drop rate, and a line for each evaluation.

    Give :meth:`show` to a ``HistoryCallback`` as a sink. Where the console is no terminal, only the lines are
    written. Works in any ``transformers.Trainer``.

    Args:
        label: what is being trained.
        console: where to draw; by default standard error.
    """

    def __init__(self, label: str = "training", console: Console | None = None):
        self.label = label
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar."""
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        figures = TextColumn("{task.fields[figures]}")
        # Four times a second: drawing more often takes time from the two cores that train.
        self._bar = Progress(*columns, figures, console=self.console, refresh_per_second=4)
        self._task = self._bar.add_task(self.label, total=state.max_steps, completed=state.global_step, figures="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        self.close()

    def show(self, line: Line) -> None:
        """Show a line of the history."""
        if line["kind"] == "eval":
            bits = "  ".join(f"{name} {value:.3f}" for name, value in line["bits_per_byte"].items())
            self.console.print(
                f"{self.label}: step {line['step']}, bits per byte  {bits}", highlight=False, soft_wrap=True
            )
        elif self._bar is not None and self._task is not None:
            self._bar.update(self._task, figures=figures(line))

    def close(self) -> None:
        """Take the bar away; for training that ends with an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def figures(line: Line) -> str:
    """Give a training line's figures in one short text; load and drops are those of the worst layer."""
    parts = [f"loss {line['loss']:.3f}", f"{line['tokens_per_s']:,.0f} tokens/s"]
    if line.get("load_max_over_mean"):
        parts.append(f"load max/mean {max(line['load_max_over_mean'].values()):.2f}")
        parts.append(f"dropped {max(line['drop_rate'].values()):.1%}")
    return "  ".join(parts)
