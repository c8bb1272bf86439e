"""TensorBoard: the same lines as ``history.jsonl``, as scalars."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moesaic.train.history import Line


class Board:
    """Writes history lines as TensorBoard scalars; a sink for ``HistoryCallback``.

    Args:
        folder: for the event files.
        start: the step that training goes on from; what an interrupted run wrote after it is hidden.
    """

    def __init__(self, folder: Path, *, start: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    @staticmethod
    def available() -> bool:
        """Tell whether the optional ``tensorboard`` package is installed."""
        return find_spec("tensorboard") is not None

    def __call__(self, line: Line) -> None:
        """Write one line."""
        for name, value in _scalars(line["kind"], {k: v for k, v in line.items() if k not in ("kind", "step", "load")}):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _scalars(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(f"{prefix}/{name}", value)
        elif isinstance(value, int | float):
            yield f"{prefix}/{name}", value
