"""``moesaic convert top-k``: the same mixture, with fewer experts for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.convert import verb
from moesaic.cli.convert.options import Source

if TYPE_CHECKING:
    from moesaic.convert import Converted


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    verb.add(app, "top-k", fewer, example="top-k runs/a --top-k 2 --out faster")


def fewer(
    source: Source,
    top_k: Annotated[int, typer.Option(help="Experts for each token, fewer than now.", min=1)],
    **written: Any,
) -> Converted:
    """Let each token visit fewer experts; no weight changes, and the receipt tells the gap."""
    from moesaic.convert.shrink.fewer import fewer_choices

    return fewer_choices(source, top_k, **written)
