"""``moesaic convert dense``: a mixture as the dense model that its family descends from."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli.convert.show import AsJson, Out, Probe, Source, show, working
from moesaic.cli.convert.text import Context, Data, Tokens, batches


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    example = "Example: moesaic convert dense runs/a --method distill --steps 500 --out dense"
    app.command("dense", epilog=example)(dense)


def dense(
    source: Source,
    out: Out,
    method: Annotated[
        str, typer.Option(help="merge (average of experts), concat (side by side), expert (the best one) or distill.")
    ] = "merge",
    weights: Annotated[
        str, typer.Option(help="What each expert counts: frequency, saliency or uniform.")
    ] = "frequency",
    hidden: Annotated[
        int | None, typer.Option(help="Neurons of concat, or to distill; all experts' if left out.", show_default=False)
    ] = None,
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="Line up hidden neurons before averaging; slow if very wide.")
    ] = True,
    steps: Annotated[int, typer.Option(help="Of distill.", min=1)] = 200,
    learning_rate: Annotated[float, typer.Option(help="Of distill.", min=0.0)] = 1e-3,
    data: Data = "builtin",
    tokens: Tokens = 65_536,
    context: Context = None,
    probe: Probe = True,
    as_json: AsJson = False,
) -> None:
    """Put one dense network in the place of each layer's experts, and let the routers go.

    Networks are scaled by what a token's weights add up to on average. Shared experts are laid beside them.
    """
    from moesaic.convert.shrink.to_dense import to_dense

    with working():
        converted = to_dense(
            source,
            method=method,  # type: ignore[arg-type]  # checked there, as is the next
            weights=weights,  # type: ignore[arg-type]
            hidden=hidden,
            align=align,
            steps=steps,
            learning_rate=learning_rate,
            batches=batches(source, data, tokens, context),
            out=out,
            probe="random" if probe else None,
        )
    show(converted, as_json=as_json)
