"""``moesaic convert mix``: dense models that were trained apart as the experts of one mixture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.convert import verb
from moesaic.cli.convert.options import Drawn, Layers, Recipe, TopK, layers_of

if TYPE_CHECKING:
    from moesaic.convert import Converted

_Base = Annotated[
    Path, typer.Argument(help="The model that the branches came from, or any of their shape.", show_default=False)
]
_Branches = Annotated[
    list[Path], typer.Argument(help="Models whose networks are the experts, one each.", show_default=False)
]
_Rest = Annotated[str, typer.Option(help="All that is no expert: average (of the branches), or base.")]
_Weight = Annotated[
    list[float] | None,
    typer.Option(help="Part of the average that a branch has, once for each; equal if left out.", show_default=False),
]
_Prompts = Annotated[
    list[Path] | None,
    typer.Option(
        help="File of prompts that a branch is for, a prompt on each line; once for each.", show_default=False
    ),
]
_GateScale = Annotated[float, typer.Option(help="Length of a router's rows made of prompts.")]


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    verb.add(app, "mix", mix, example="mix base code poems --prompts code.txt --prompts poems.txt --out sparse")


def mix(
    base: _Base,
    branches: _Branches,
    recipe: Recipe = "mixtral",
    top_k: TopK = None,
    layers: Layers = "all",
    rest: _Rest = "average",
    weight: _Weight = None,
    prompts: _Prompts = None,
    gate_scale: _GateScale = 1.0,
    *,
    drawn: Drawn,
    **written: Any,
) -> Converted:
    """Make the feed-forward networks of several dense models the experts of one mixture, and average the rest.

    With prompts, routers send a token to the experts whose prompts look like it; without, training has to find out.
    """
    from moesaic.convert import branch_train_mix

    return branch_train_mix(
        base,
        branches,
        recipe=recipe,
        top_k=top_k,
        layers=layers_of(layers),
        rest=rest,  # type: ignore[arg-type]  # checked there
        weights=weight or None,
        prompts=[_lines(file) for file in prompts] if prompts else None,
        gate_scale=gate_scale,
        **drawn.keywords(),
        **written,
    )


def _lines(file: Path) -> list[str]:
    from moesaic.core.errors import DataError

    try:
        found = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text ({error}). Give a file with a prompt on each line.") from error
    if not found:
        raise DataError(f"{file} has no prompt in it. Write one on each line.")
    return found
