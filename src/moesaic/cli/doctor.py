"""``moesaic doctor``: what goes wrong in a mixture without a word."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesaic.doctor import Report

_COLOURS = {"healthy": "green", "warning": "yellow", "sick": "bold red", "not checked": "dim"}


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor", epilog="Example: moesaic doctor runs/a")(doctor)


def doctor(
    path: Annotated[Path, typer.Argument(help="A run folder, a model folder, or a history.jsonl.", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="The text to run the model on. [default: the run's own, or builtin]")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of it to read, about.", min=64)] = 8192,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Examine a run or a model: is the balance loss attached, are experts dead, is noise alive in evaluation, ...

    Each check says what it measured and what to do. The exit code is 1 if one of them finds the patient sick, and 0 if
    there are warnings at most.
    """
    from moesaic.doctor import examine

    with _progress() as progress:
        report = examine(path, data=data, tokens=tokens, progress=progress)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        _show(report)
    if report.verdict == "sick":
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    drawn = Table(show_lines=True, title=_heading(report))
    drawn.add_column("check", no_wrap=True)
    drawn.add_column("verdict", no_wrap=True)
    drawn.add_column("what was found, and what to do")
    for finding in report.findings:
        words = Text(finding.words)
        if finding.remedy:
            words.append(f"\n→ {finding.remedy}", style="italic")
        drawn.add_row(Text(finding.name), Text(finding.verdict, style=_COLOURS[finding.verdict]), words)
    console.print(drawn)
    console.print(_summary(report), highlight=False)


def _heading(report: Report) -> str:
    from rich.markup import escape

    read = f", on {report.read}" if report.read else ""
    return escape(f"{report.subject}{read}")


def _summary(report: Report) -> str:
    from moesaic.doctor.finding import VERDICTS

    counts = {verdict: len(report.of(verdict)) for verdict in VERDICTS}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"{report.verdict}: {told}"
