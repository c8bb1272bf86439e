"""``moesaic convert top-k``: the same mixture, with fewer experts for each token."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli.convert.show import AsJson, Out, Probe, Source, show, working


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("top-k", epilog="Example: moesaic convert top-k runs/a --top-k 2 --out faster")(fewer)


def fewer(
    source: Source,
    out: Out,
    top_k: Annotated[int, typer.Option(help="Experts for each token, fewer than now.", min=1)],
    probe: Probe = True,
    as_json: AsJson = False,
) -> None:
    """Let each token visit fewer experts; no weight changes, and the receipt tells the gap."""
    from moesaic.convert.shrink.fewer import fewer_choices

    with working():
        converted = fewer_choices(source, top_k, out=out, probe="random" if probe else None)
    show(converted, as_json=as_json)
