"""What the verbs of ``moesaic convert`` share: the options that all have, a bar while they work, and the receipt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesaic.convert import Converted

Source = Annotated[
    Path,
    typer.Argument(help="A model folder, or a run folder, of which the newest model is taken.", show_default=False),
]
Out = Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")]
Probe = Annotated[
    bool, typer.Option("--probe/--no-probe", help="Run both models on a small batch and compare their logits.")
]


@contextmanager
def working() -> Iterator[None]:
    """Draw a bar on standard error while a conversion runs, where that is a terminal; keep transformers quiet."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from moesaic.convert.progress import drawing
    from moesaic.train.quiet import quiet_transformers

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    with quiet_transformers(), Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        with drawing(draw):
            yield


def show(converted: Converted, *, as_json: bool) -> None:
    """Print the receipt: as JSON, or as one line and its notes."""
    receipt = converted.receipt
    if as_json:
        sys.stdout.write(receipt.to_json())
        return
    print(receipt)
    for note in receipt.notes:
        print(f"  {note}")
    if receipt.optimizer is not None:
        print(f"  optimizer: {receipt.optimizer}")
    print(f"Written to {converted.folder}, with its receipt in receipt.json.")
