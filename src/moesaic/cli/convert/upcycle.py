"""``moesaic convert upcycle``: a dense model as a mixture whose experts are copies of its networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.convert import verb
from moesaic.cli.convert.options import Drawn, Mixture, Source

if TYPE_CHECKING:
    from moesaic.convert import Converted

_Granularity = Annotated[
    int, typer.Option(help="Shards that each network is cut into, kept together by virtual groups.", min=1)
]
_Method = Annotated[str, typer.Option(help="copy, or drop (part of each expert's neurons drawn anew).")]
_DropRatio = Annotated[float, typer.Option(help="Which part, for drop.", min=0.0, max=1.0)]
_Noise = Annotated[float, typer.Option(help="Noise on experts, as a part of their weights' spread.", min=0.0)]
_Shared = Annotated[
    str, typer.Option(help="A shared expert starts silent, or is the dense network and the others are silent.")
]
_ScaleIn = Annotated[
    str, typer.Option(help="Matrices that take the factor: down (exact), or published (all, as Megatron-LM).")
]
_RouterStd = Annotated[
    float | None, typer.Option(help="Spread of the router's weight; the recipe's if left out.", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    verb.add(app, "upcycle", upcycle, example="upcycle dense --recipe mixtral --num-experts 8 --top-k 2 --out sparse")


def upcycle(
    source: Source,
    mixture: Mixture,
    granularity: _Granularity = 1,
    method: _Method = "copy",
    drop_ratio: _DropRatio = 0.5,
    noise: _Noise = 0.0,
    shared: _Shared = "silent",
    scale_in: _ScaleIn = "down",
    router_std: _RouterStd = None,
    *,
    drawn: Drawn,
    **written: Any,
) -> Converted:
    """Copy each feed-forward network of a dense model into the experts of an MoE layer.

    The mixture computes what the dense model does, where the recipe's weights of a token add up to one number; the
    receipt tells whether, or how far they are apart.
    """
    from moesaic.convert.grow.upcycle import upcycle as convert_to_mixture

    return convert_to_mixture(
        source,
        **mixture.keywords(),
        granularity=granularity,
        method=method,  # type: ignore[arg-type]  # checked there, as are the next two
        drop_ratio=drop_ratio,
        noise=noise,
        shared=shared,  # type: ignore[arg-type]
        scale_in=scale_in,  # type: ignore[arg-type]
        router_std=router_std,
        **drawn.keywords(),
        **written,
    )
