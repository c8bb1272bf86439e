"""What a verb measured: groups of lines, each line one contender; the same form for all verbs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from moesaic.bench.machine import Machine
from moesaic.core.errors import CheckpointError

FORM = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """A bound, and whether it is kept.

    Attributes:
        what: is bounded, in words.
        bound: the number.
        at_most: whether the value must be at most, or at least, the bound.
        value: what was measured.
    """

    what: str
    bound: float
    at_most: bool
    value: float

    @property
    def met(self) -> bool:
        """Whether the value keeps the bound."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{self.what} {sign} {self.bound:.2f}: {self.value:.2f} {'met' if self.met else 'missed'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One contender in one group.

    Attributes:
        name: of the contender.
        samples: one for each round, in the group's unit; empty if it was not measured.
        ratios: each sample over the limit's of the same round; empty where there is no limit.
        note: why it was not measured, or what else there is to know.
        goals: what it must reach.
    """

    name: str
    samples: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    note: str = ""
    goals: tuple[Goal, ...] = ()

    @property
    def value(self) -> float | None:
        """The median."""
        return median(self.samples) if self.samples else None

    @property
    def ratio(self) -> float | None:
        """The median of the ratios."""
        return median(self.ratios) if self.ratios else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Lines that were measured in the same rounds.

    Attributes:
        title: what was measured.
        facts: the same for programs: case, dtype, sizes.
        unit: of samples.
        limit: the line that ratios are to; empty where there is none.
        lines: one for each contender.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    limit: str = ""
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def line(self, name: str) -> Line | None:
        """That of a contender."""
        return next((line for line in self.lines if line.name == name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run of a verb.

    Attributes:
        verb: which.
        machine: where.
        rounds: of each group.
        about: how it was measured, a sentence each.
        groups: what was measured.
    """

    verb: str
    machine: Machine
    rounds: int
    about: tuple[str, ...]
    groups: tuple[Group, ...]

    def to_json(self) -> str:
        """As text, numbers to four digits."""
        return json.dumps({"form": FORM, **_short(asdict(self))}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Result:
        """Read what :meth:`to_json` gave.

        Raises:
            CheckpointError: if the file is something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["form"] != FORM:
                raise ValueError(f"form {values['form']}, expected {FORM}")
            return cls(
                verb=values["verb"],
                machine=Machine(**values["machine"]),
                rounds=values["rounds"],
                about=tuple(values["about"]),
                groups=tuple(_group(one) for one in values["groups"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The figures of a bench could not be read from {path}: {error}. Measure again with --out."
            ) from error


def _group(values: dict[str, Any]) -> Group:
    return Group(**{**values, "lines": tuple(_line(one) for one in values["lines"])})


def _line(values: dict[str, Any]) -> Line:
    goals = tuple(Goal(**one) for one in values["goals"])
    return Line(**{**values, "samples": tuple(values["samples"]), "ratios": tuple(values["ratios"]), "goals": goals})


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_short(inner) for inner in value]
    return value
