"""``moesaic bench page``: all results as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("page", epilog="Example: moesaic bench page")(page)


def page(
    results: Annotated[Path, typer.Option(help="Folder of figures, as --out has written them.")] = Path(
        "benchmarks/results"
    ),
    out: Annotated[Path, typer.Option(help="The page; its drawings go beside it.")] = Path("docs/speed.md"),
) -> None:
    """Write a page with the tables and drawings of all results."""
    from moesaic.bench.page import write
    from moesaic.bench.picture import needs_pictures

    needs_pictures()
    written = write(results, out)
    typer.echo(f"Wrote {', '.join(map(str, written))}.", err=True)
