"""``moesaic convert split``: a dense model as a mixture whose experts are slices of its networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.convert import verb
from moesaic.cli.convert.options import Context, Drawn, Mixture, Source, Text

if TYPE_CHECKING:
    from moesaic.convert import Converted

_Method = Annotated[
    str | None,
    typer.Option(
        help="Which neurons go together: random, cluster, coactivation or importance; coactivation if there is text.",
        show_default=False,
    ),
]
_Gate = Annotated[
    str | None,
    typer.Option(
        help="How routers start: zero, random, centers, from-data or moefication; from-data if there is text.",
        show_default=False,
    ),
]
_Scale = Annotated[
    str | None,
    typer.Option(
        help="What a token's weights add up to: fit, slices, published or a number; fit if there is text.",
        show_default=False,
    ),
]
_Data = Annotated[str, typer.Option(help="Text to see what neurons do on: builtin, a file, a folder, or none.")]
_Tokens = Annotated[int, typer.Option(help="Tokens of it to read; all layers' are in memory.", min=1)]
_Rows = Annotated[str, typer.Option(help="Rows that cluster compares: up or gate.")]
_Metric = Annotated[str, typer.Option(help="How cluster compares them: l2 or cos.")]
_ActiveShare = Annotated[float, typer.Option(help="Part of the neurons that coactivation counts as active.")]
_Overlap = Annotated[bool, typer.Option("--overlap", help="Let experts of importance share neurons.")]
_Hidden = Annotated[
    int | None, typer.Option(help="Neurons of an expert with --overlap; F / E if left out.", show_default=False)
]
_Spread = Annotated[float, typer.Option(help="Spread of the logits of a gate that is fitted.")]


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    example = "split dense --num-experts 8 --top-k 4 --method coactivation --out sparse"
    verb.add(app, "split", split, example=example)


def split(
    source: Source,
    mixture: Mixture,
    method: _Method = None,
    gate: _Gate = None,
    scale: _Scale = None,
    data: _Data = "builtin",
    tokens: _Tokens = 2048,
    context: Context = None,
    rows: _Rows = "up",
    metric: _Metric = "l2",
    active_share: _ActiveShare = 0.1,
    overlap: _Overlap = False,
    hidden: _Hidden = None,
    spread: _Spread = 0.02,
    *,
    drawn: Drawn,
    **written: Any,
) -> Converted:
    """Cut each feed-forward network of a dense model into the experts of an MoE layer.

    Parameters stay as many, but for routers. A token then meets only part of the network: the receipt tells how much of
    its output is missing, which training has to make up for.
    """
    from moesaic.convert.grow.split import split as convert_to_mixture

    text = Text(data=data, tokens=tokens, context=context)
    return convert_to_mixture(
        source,
        **mixture.keywords(),
        method=method,  # type: ignore[arg-type]  # checked there, as are the other words
        gate=gate,  # type: ignore[arg-type]
        scale=_scale_of(scale),  # type: ignore[arg-type]
        text=None if data == "none" else text.batches(source),
        max_tokens=tokens,
        rows=rows,  # type: ignore[arg-type]
        metric=metric,  # type: ignore[arg-type]
        active_share=active_share,
        overlap=overlap,
        hidden=hidden,
        spread=spread,
        **drawn.keywords(),
        **written,
    )


def _scale_of(text: str | None) -> str | float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
