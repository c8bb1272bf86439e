"""``moesaic convert prune``: a mixture without its least useful experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.convert import verb
from moesaic.cli.convert.options import Source, Text, number_of_experts

if TYPE_CHECKING:
    from moesaic.convert import Converted


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    verb.add(app, "prune", prune, example="prune runs/a --keep 0.5 --out smaller")


def prune(
    source: Source,
    keep: Annotated[str, typer.Option(help="Experts that each layer keeps: a number, or a share such as 0.5.")],
    by: Annotated[str, typer.Option(help="What experts are ranked by: reap, frequency, ean or weight.")] = "reap",
    protect_super: Annotated[
        bool, typer.Option("--protect-super-experts", help="Keep the few experts with extreme outputs.")
    ] = False,
    *,
    text: Text,
    **written: Any,
) -> Converted:
    """Remove the least useful experts of each layer, and their rows of the router.

    What is useful is measured on text: by router-weighted output length (REAP) unless told otherwise. Routers that
    choose among groups keep as many experts in each.
    """
    from moesaic.convert.shrink.prune import prune_experts

    return prune_experts(
        source,
        number_of_experts(keep, "--keep"),
        by=by,  # type: ignore[arg-type]  # checked there
        batches=text.batches(source),
        protect="super-experts" if protect_super else None,
        **written,
    )
