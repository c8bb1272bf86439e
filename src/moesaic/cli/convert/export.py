"""``moesaic convert export``: a sparse model of ours as the family that others serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.convert import verb
from moesaic.cli.convert.options import Source

if TYPE_CHECKING:
    from moesaic.convert import Converted


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    verb.add(app, "export", export, example="export runs/a --out served")


def export(
    source: Source,
    family: Annotated[
        str, typer.Option(help="The family's model_type, such as mixtral; auto takes the first that fits.")
    ] = "auto",
    dropless: Annotated[
        bool, typer.Option("--dropless", help="Leave out a capacity, which no family has: keep the rows it drops.")
    ] = False,
    **written: Any,
) -> Converted:
    """Write a model made with sparsify as the family of transformers that computes the same.

    vLLM, SGLang, llama.cpp and plain transformers can then serve it. Where no family computes the same, the command
    says which part has no home.
    """
    from moesaic.convert import export as convert_to_native

    return convert_to_native(source, family, dropless=dropless, **written)
