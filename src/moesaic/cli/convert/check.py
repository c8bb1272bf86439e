"""``moesaic convert check``: whether a folder is still what its receipt says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.convert.options import AsJson


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("check", epilog="Example: moesaic convert check served")(check)


def check(
    folder: Annotated[Path, typer.Argument(help="A folder that moesaic convert has written.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare every file of a folder with its receipt, and its tensors with what its configuration describes."""
    from moesaic.convert.proof.check import check_folder

    receipt = check_folder(folder)
    print(receipt.to_json() if as_json else f"{folder} is what its receipt says. {receipt}")
