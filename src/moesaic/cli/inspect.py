"""``moesaic inspect``: what each expert of a trained model takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    example = "Example: moesaic inspect runs/a --data builtin --out runs/a/report.html"
    two = "Two checkpoints side by side: moesaic inspect runs/a --compare runs/b"
    app.command("inspect", epilog=f"{example}. {two}")(inspect)


def inspect(
    path: Annotated[Path, typer.Argument(help="A run folder, a model folder, or a trace file.", show_default=False)],
    data: Annotated[str | None, typer.Option(help="The text to read. [default: the run's own]")] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write. [default: PATH/report.html]")] = None,
    compare: Annotated[Path | None, typer.Option(help="Another of the same, to put beside it.")] = None,
    tokens: Annotated[int, typer.Option(help="Held-out tokens of each domain to read, at most.", min=1)] = 16384,
    sample: Annotated[float, typer.Option(help="Keep this share of the sequences, each whole.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Run a model over held-out text, record every choice of its routers, and draw what each expert took.

    Writes a page with pictures, their files in a folder beside it, and the routing trace (Parquet). A trace file is
    drawn as it is.
    """
    from moesaic.cli.report import Source, write_report

    source = Source(path=path, data=data, tokens=tokens, sample=sample)
    page = out or (path.with_suffix(".html") if path.is_file() else path / "report.html")
    figures = write_report(source, page, compare=compare)
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        _show(figures)


def _show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    drawn = Table(title=f"{figures['tokens']:,} tokens: {', '.join(figures['domains'])}")
    for name in ("layer", "experts", "load max/mean", "dropped rows"):
        drawn.add_column(name, justify="left" if name == "layer" else "right")
    for layer, count in figures["num_experts"].items():
        imbalance, dropped = figures["load_max_over_mean"][layer], figures["drop_rate"][layer]
        drawn.add_row(layer, str(count), f"{imbalance:.2f}", f"{dropped:.2%}")
    console.print(drawn)
    console.print(f"Experts that got nothing: {figures['idle_experts']}", highlight=False)
    console.print(f"Report: {figures['report']}", highlight=False, soft_wrap=True)
    console.print(f"Trace: {figures['trace']}", highlight=False, soft_wrap=True)
