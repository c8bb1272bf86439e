"""``moesaic convert export``: a sparse model of ours as the family that others serve."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli.convert.show import AsJson, Out, Probe, Source, show, working


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("export", epilog="Example: moesaic convert export runs/a --out served")(export)


def export(
    source: Source,
    out: Out,
    family: Annotated[
        str, typer.Option(help="The family's model_type, such as mixtral; auto takes the first that fits.")
    ] = "auto",
    dropless: Annotated[
        bool, typer.Option("--dropless", help="Leave out a capacity, which no family has: keep the rows it drops.")
    ] = False,
    probe: Probe = True,
    as_json: AsJson = False,
) -> None:
    """Write a model made with sparsify as the family of transformers that computes the same.

    vLLM, SGLang, llama.cpp and plain transformers can then serve it. Where no family computes the same, the command
    says which part has no home.
    """
    from moesaic.convert import export as convert_to_native

    with working():
        converted = convert_to_native(source, family, out, dropless=dropless, probe="random" if probe else None)
    show(converted, as_json=as_json)
