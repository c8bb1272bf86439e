"""Read back what a training run wrote about itself: its history, line by line, and its summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.errors import DataError
from moesaic.lens.measures.measured import FloatArray

Series = dict[str, FloatArray]
"""One value for each logged step under each name; NaN where a line lacks it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run's history.

    Attributes:
        label: what the run is called on the page.
        is_sparse: True if it has MoE layers.
        step: optimizer step of each training line.
        loss: its training loss in nats per token, balance losses included.
        load: share of each expert over the steps, (steps, experts), by layer.
        max_over_mean, drop_rate, router_entropy: one value for each training line, by layer.
        eval_step: optimizer step of each evaluation.
        bits_per_byte: one value for each evaluation, by domain, ``mean`` among them.
        summary: the run's own final figures; empty where it did not finish.
    """

    label: str
    is_sparse: bool
    step: FloatArray
    loss: FloatArray
    load: Series
    max_over_mean: Series
    drop_rate: Series
    router_entropy: Series
    eval_step: FloatArray
    bits_per_byte: Series
    summary: Mapping[str, Any]

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its end and measured all held-out text."""
        stored = self.summary.get("bits_per_byte")
        return isinstance(stored, Mapping) and "mean" in stored

    @property
    def caption(self) -> str:
        """The label, and the step of the last evaluation where the run has not finished."""
        if self.is_finished or not len(self.eval_step):
            return self.label
        return f"{self.label}, unfinished, step {self.eval_step[-1]:.0f}"

    @property
    def last_bits_per_byte(self) -> dict[str, float]:
        """Held-out bits per byte by domain, ``mean`` among them: the summary's, else the last evaluation's."""
        stored = self.summary.get("bits_per_byte")
        if isinstance(stored, Mapping) and stored:
            return {str(name): float(value) for name, value in stored.items() if isinstance(value, int | float)}
        return {name: float(values[-1]) for name, values in self.bits_per_byte.items() if len(values)}


def read_run(label: str, folder: str | Path) -> Run:
    """Read ``history.jsonl`` and ``summary.json`` of a run folder.

    A last line that was cut short by a killed run is left out; where a resumed run wrote a step twice, the later
    line holds.

    Raises:
        DataError: if the folder has no history, or a line of it is not what training writes.
    """
    folder = Path(folder)
    train, evaluations = _history(folder / "history.jsonl")
    load = {name: _matrix([_named(line, "load").get(name) for line in train]) for name in _names(train, "load")}
    load = {name: share for name, share in load.items() if share.size}
    summary = _summary(folder / "summary.json")
    return Run(
        label=label,
        is_sparse=bool(load) or "moe" in summary or bool(_names(train, "load_max_over_mean")),
        step=_column(train, "step"),
        loss=_column(train, "loss"),
        load=load,
        max_over_mean=_series(train, "load_max_over_mean"),
        drop_rate=_series(train, "drop_rate"),
        router_entropy=_series(train, "router_entropy"),
        eval_step=_column(evaluations, "step"),
        bits_per_byte=_series(evaluations, "bits_per_byte"),
        summary=summary.get("moe") or summary.get("dense") or {},
    )


def _history(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(
            f"A run folder needs history.jsonl, but {path} does not exist. "
            "Give the folder that training wrote, one for each run."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} could not be read: {error}. Give the folder that training wrote.") from error
    by_step: dict[str, dict[float, dict[str, Any]]] = {"train": {}, "eval": {}}
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            kind, step = line["kind"], float(line["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise DataError(
                f'Line {number} of {path} is no record of training (an object with "kind" and "step"). '
                "Mend or remove that line."
            ) from error
        if kind in by_step:
            by_step[kind][step] = line
    train, evaluations = ([lines[step] for step in sorted(lines)] for lines in by_step.values())
    return train, evaluations


def _summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A run that was stopped has none, and the history says all that is needed.
        return {}
    return summary if isinstance(summary, dict) else {}


def _names(lines: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in _named(line, key)))


def _named(line: dict[str, Any], key: str) -> dict[str, Any]:
    value = line.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _column(lines: list[dict[str, Any]], key: str) -> FloatArray:
    return np.array([_number(line.get(key)) for line in lines], dtype=np.float64)


def _series(lines: list[dict[str, Any]], key: str) -> Series:
    return {
        name: np.array([_number(_named(line, key).get(name)) for line in lines], dtype=np.float64)
        for name in _names(lines, key)
    }


def _matrix(rows: list[Any]) -> FloatArray:
    width = max((len(row) for row in rows if isinstance(row, list)), default=0)
    whole = [row if isinstance(row, list) and len(row) == width else [None] * width for row in rows]
    return np.array([[_number(value) for value in row] for row in whole], dtype=np.float64)
