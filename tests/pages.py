"""Pages of the documentation that a run of the tests writes: a table in which a cell holds if its tests passed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Held = Mapping[tuple[object, ...], bool]
"""From cells that were tried to whether every test behind them passed."""


def add_option(parser: pytest.Parser, kind: str, what: str) -> None:
    """Let ``pytest --write-KIND FILE`` ask for a page."""
    parser.addoption(f"--write-{kind}", metavar="FILE", help=f"write the table of {what} there")


def write_if_asked(config: pytest.Config, kind: str, table: Callable[[Held], str]) -> None:
    """Write a page at the end of the run, where it was asked for.

    Args:
        config: of the run.
        kind: of the page; tests tell their cells with ``record_property(kind, cell)``.
        table: the page's text.
    """
    path = config.getoption(f"--write-{kind}", default=None)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(kind, Path(path), table), kind)


class _Writer:
    def __init__(self, kind: str, path: Path, table: Callable[[Held], str]) -> None:
        self.kind, self.path, self.table = kind, path, table
        self.held: dict[tuple[object, ...], bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            # A test that was skipped is no evidence: its cell does not hold.
            if name == self.kind and (report.when == "call" or not report.passed):
                cell = tuple(value)
                self.held[cell] = self.held.get(cell, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(self.table(self.held), encoding="utf-8")
