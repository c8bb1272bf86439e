"""``moesaic convert prune``: a mixture without its least useful experts."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli.convert.show import AsJson, Out, Probe, Source, show, working
from moesaic.cli.convert.text import Context, Data, Tokens, batches


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("prune", epilog="Example: moesaic convert prune runs/a --keep 0.5 --out smaller")(prune)


def prune(
    source: Source,
    out: Out,
    keep: Annotated[str, typer.Option(help="Experts that each layer keeps: a number, or a share such as 0.5.")],
    by: Annotated[str, typer.Option(help="What experts are ranked by: reap, frequency, ean or weight.")] = "reap",
    protect_super: Annotated[
        bool, typer.Option("--protect-super-experts", help="Keep the few experts with extreme outputs.")
    ] = False,
    data: Data = "builtin",
    tokens: Tokens = 65_536,
    context: Context = None,
    probe: Probe = True,
    as_json: AsJson = False,
) -> None:
    """Remove the least useful experts of each layer, and their rows of the router.

    What is useful is measured on text: by router-weighted output length (REAP) unless told otherwise. Routers that
    choose among groups keep as many experts in each.
    """
    from moesaic.convert.shrink.prune import prune_experts

    count = number_of_experts(keep, "--keep")
    with working():
        converted = prune_experts(
            source,
            count,
            by=by,  # type: ignore[arg-type]  # checked there
            batches=batches(source, data, tokens, context),
            protect="super-experts" if protect_super else None,
            out=out,
            probe="random" if probe else None,
        )
    show(converted, as_json=as_json)


def number_of_experts(text: str, option: str) -> int | float:
    """A whole number, or a share.

    Raises:
        ConfigError: if it is neither.
    """
    from moesaic.core.errors import ConfigError

    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise ConfigError(
            f"{option} must be a number of experts, or a share of them such as 0.5, got {text!r}. Half is 0.5."
        ) from error
