"""``moesaic convert merge``: a mixture whose like experts are one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.convert import verb
from moesaic.cli.convert.options import Align, Source, Text, number_of_experts

if TYPE_CHECKING:
    from moesaic.convert import Converted


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    verb.add(app, "merge", merge, example="merge runs/a --to 0.5 --out smaller")


def merge(
    source: Source,
    to: Annotated[str, typer.Option(help="Experts that each layer shall have: a number, or a share such as 0.5.")],
    cluster: Annotated[
        str, typer.Option(help="What experts are compared by: outputs, functions, weights or router.")
    ] = "outputs",
    average: Annotated[
        str, typer.Option(help="What each counts in its cluster: frequency, saliency or uniform.")
    ] = "frequency",
    router: Annotated[str, typer.Option(help="A cluster's row of the router: mean or dominant.")] = "mean",
    align: Align = True,
    *,
    text: Text,
    **written: Any,
) -> Converted:
    """Cluster the experts of each layer and put one expert, their average, in the place of each cluster."""
    from moesaic.convert.shrink.merge import merge_experts

    return merge_experts(
        source,
        number_of_experts(to, "--to"),
        cluster=cluster,  # type: ignore[arg-type]  # checked there, as are the next two
        average=average,  # type: ignore[arg-type]
        router=router,  # type: ignore[arg-type]
        align=align,
        batches=text.batches(source),
        **written,
    )
