"""``moesaic convert dense``: a mixture as the dense model that its family descends from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.convert import verb
from moesaic.cli.convert.options import Align, Source, Text

if TYPE_CHECKING:
    from moesaic.convert import Converted


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    verb.add(app, "dense", dense, example="dense runs/a --method distill --steps 500 --out dense")


def dense(
    source: Source,
    method: Annotated[
        str, typer.Option(help="merge (average of experts), concat (side by side), expert (the best one) or distill.")
    ] = "merge",
    weights: Annotated[
        str, typer.Option(help="What each expert counts: frequency, saliency or uniform.")
    ] = "frequency",
    hidden: Annotated[
        int | None, typer.Option(help="Neurons of concat, or to distill; all experts' if left out.", show_default=False)
    ] = None,
    align: Align = True,
    steps: Annotated[int, typer.Option(help="Of distill.", min=1)] = 200,
    learning_rate: Annotated[float, typer.Option(help="Of distill.", min=0.0)] = 1e-3,
    *,
    text: Text,
    **written: Any,
) -> Converted:
    """Put one dense network in the place of each layer's experts, and let the routers go.

    Networks are scaled by what a token's weights add up to on average. Shared experts are laid beside them.
    """
    from moesaic.convert.shrink.to_dense import to_dense

    return to_dense(
        source,
        method=method,  # type: ignore[arg-type]  # checked there, as is the next
        weights=weights,  # type: ignore[arg-type]
        hidden=hidden,
        align=align,
        steps=steps,
        learning_rate=learning_rate,
        batches=text.batches(source),
        **written,
    )
