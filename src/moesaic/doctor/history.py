"""What a run wrote about itself, as series that checks can look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.errors import DataError
from moesaic.doctor.vitals import FloatArray

Series = Mapping[str, FloatArray]
"""One value for each training line, by layer or by name; NaN where a line lacks it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class History:
    """The training lines of ``history.jsonl``, in the order of their steps.

    Attributes:
        path: of the file.
        step: optimizer step of each line.
        tokens: tokens read until then.
        loss: balance losses included.
        grad_norm: of all weights.
        aux: each balance loss, unscaled.
        load: share of each expert by layer, (lines, E).
        max_over_mean, drop_rate, entropy: by layer.
        router_logit: largest size of a logit, by layer; empty for runs that did not write it.
        bias: selection bias of each expert by layer, (lines, E); empty for runs without one, or that did not write it.
        eval_step: optimizer step of each evaluation.
        bits_per_byte: of each evaluation, the mean over domains.
    """

    path: str
    step: FloatArray
    tokens: FloatArray
    loss: FloatArray
    grad_norm: FloatArray
    aux: Series
    load: Series
    max_over_mean: Series
    drop_rate: Series
    entropy: Series
    router_logit: Series
    bias: Series
    eval_step: FloatArray
    bits_per_byte: FloatArray

    @property
    def num_lines(self) -> int:
        """Training lines."""
        return len(self.step)

    @property
    def last(self) -> slice:
        """The last tenth of the lines, at least three: one step alone is noise."""
        return slice(-max(3, self.num_lines // 10), None)

    @property
    def first(self) -> slice:
        """The first tenth of the lines, at least three."""
        return slice(None, max(3, self.num_lines // 10))


def read_history(path: Path) -> History:
    """Read a history; a last line that was cut short is left out, of a step written twice the later line holds.

    Raises:
        DataError: if it cannot be read, or no line of it is a record of training.
    """
    train, evaluations = _lines(path)
    if not train:
        raise DataError(f"{path} has no line of training. Give the history.jsonl of a run that has logged something.")
    return History(
        path=str(path),
        step=_column(train, "step"),
        tokens=_column(train, "tokens"),
        loss=_column(train, "loss"),
        grad_norm=_column(train, "grad_norm"),
        aux=_series(train, "aux"),
        load=_matrices(train, "load"),
        max_over_mean=_series(train, "load_max_over_mean"),
        drop_rate=_series(train, "drop_rate"),
        entropy=_series(train, "router_entropy"),
        router_logit=_series(train, "router_logit"),
        bias=_matrices(train, "bias"),
        eval_step=_column(evaluations, "step"),
        bits_per_byte=np.array([_number(_named(line, "bits_per_byte").get("mean")) for line in evaluations]),
    )


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} could not be read: {error}. Give the folder that training wrote.") from error
    by_step: dict[str, dict[float, dict[str, Any]]] = {"train": {}, "eval": {}}
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            kind, step = line["kind"], float(line["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(texts) and number > 1:
                break
            raise DataError(
                f'Line {number} of {path} is no record of training (an object with "kind" and "step"). '
                "Mend or remove that line."
            ) from error
        by_step.get(kind, {})[step] = line
    train, evaluations = ([lines[step] for step in sorted(lines)] for lines in by_step.values())
    return train, evaluations


def _named(line: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = line.get(key)
    return value if isinstance(value, dict) else {}


def _names(lines: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in _named(line, key)))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> FloatArray:
    return np.array([_number(line.get(key)) for line in lines], dtype=np.float64)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> dict[str, FloatArray]:
    return {name: np.array([_number(_named(one, key).get(name)) for one in lines]) for name in _names(lines, key)}


def _matrices(lines: Sequence[Mapping[str, Any]], key: str) -> dict[str, FloatArray]:
    found = {}
    for name in _names(lines, key):
        rows = [_named(line, key).get(name) for line in lines]
        width = max((len(row) for row in rows if isinstance(row, list)), default=0)
        whole = [row if isinstance(row, list) and len(row) == width else [None] * width for row in rows]
        if width:
            found[name] = np.array([[_number(value) for value in row] for row in whole], dtype=np.float64)
    return found
