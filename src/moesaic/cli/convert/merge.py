"""``moesaic convert merge``: a mixture whose like experts are one."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli.convert.prune import number_of_experts
from moesaic.cli.convert.show import AsJson, Out, Probe, Source, show, working
from moesaic.cli.convert.text import Context, Data, Tokens, batches


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("merge", epilog="Example: moesaic convert merge runs/a --to 0.5 --out smaller")(merge)


def merge(
    source: Source,
    out: Out,
    to: Annotated[str, typer.Option(help="Experts that each layer shall have: a number, or a share such as 0.5.")],
    cluster: Annotated[
        str, typer.Option(help="What experts are compared by: outputs, functions, weights or router.")
    ] = "outputs",
    average: Annotated[
        str, typer.Option(help="What each counts in its cluster: frequency, saliency or uniform.")
    ] = "frequency",
    router: Annotated[str, typer.Option(help="A cluster's row of the router: mean or dominant.")] = "mean",
    align: Annotated[
        bool, typer.Option("--align/--no-align", help="Line up hidden neurons before averaging; slow if very wide.")
    ] = True,
    data: Data = "builtin",
    tokens: Tokens = 65_536,
    context: Context = None,
    probe: Probe = True,
    as_json: AsJson = False,
) -> None:
    """Cluster the experts of each layer and put one expert, their average, in the place of each cluster."""
    from moesaic.convert.shrink.merge import merge_experts

    count = number_of_experts(to, "--to")
    with working():
        converted = merge_experts(
            source,
            count,
            cluster=cluster,  # type: ignore[arg-type]  # checked there, as are the next two
            average=average,  # type: ignore[arg-type]
            router=router,  # type: ignore[arg-type]
            align=align,
            batches=batches(source, data, tokens, context),
            out=out,
            probe="random" if probe else None,
        )
    show(converted, as_json=as_json)
