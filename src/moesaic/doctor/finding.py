"""What the doctor says: a finding for each check, with its numbers, and a report of all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["healthy", "warning", "sick", "not checked"]

VERDICTS: tuple[Verdict, ...] = ("sick", "warning", "healthy", "not checked")
"""Worst first; what was not checked says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        verdict: "healthy", "warning", "sick", or "not checked", which is never a good sign by itself.
        words: one or two sentences with the numbers that decided; where nothing was checked, why.
        remedy: what to do about it; empty where nothing has to be done.
        evidence: the numbers behind the words, by name, as JSON values.
        source: where the rule comes from.
    """

    name: str
    verdict: Verdict
    words: str
    remedy: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; a number that JSON does not have becomes a string."""
        values: dict[str, Any] = plain(asdict(self))
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All findings about one model or run.

    Attributes:
        subject: what was examined: a path, or the name of a class.
        read: what text the model was run on, in words; empty if it was not run.
        findings: one for each check, in a fixed order.
    """

    subject: str
    read: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all; "not checked" only if nothing could be checked."""
        found = {finding.verdict for finding in self.findings}
        return next((verdict for verdict in VERDICTS if verdict in found), "not checked")

    def __getitem__(self, name: str) -> Finding:
        """The finding of one check.

        Raises:
            KeyError: naming the checks that there are.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"no check is called {name!r}; there are {', '.join(one.name for one in self.findings)}")

    def of(self, verdict: Verdict) -> tuple[Finding, ...]:
        """The findings with that verdict."""
        return tuple(finding for finding in self.findings if finding.verdict == verdict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"subject": self.subject, "read": self.read, "verdict": self.verdict, "findings": findings}

    def __str__(self) -> str:
        lines = [f"{self.subject}: {self.verdict}"]
        for one in self.findings:
            lines.append(f"{one.verdict:11}  {one.name}: {one.words}" + (f" {one.remedy}" if one.remedy else ""))
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Unknown:
    """In the place of a measurement that could not be made.

    Attributes:
        why: in words that go on from "not checked:".
    """

    why: str


def unchecked(name: str, why: str, source: str = "") -> Finding:
    """The finding of a check that could not be made."""
    return Finding(name=name, verdict="not checked", words=f"{why[:1].upper()}{why[1:].rstrip('.')}.", source=source)


def plain(value: Any) -> Any:
    """A value as JSON has it: infinite numbers as strings, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
