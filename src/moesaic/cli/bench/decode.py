"""``moesaic bench decode``: a few tokens at a time."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli.bench.options import (
    AsJson,
    Cases,
    Device,
    Dtypes,
    Only,
    Out,
    Quick,
    Shared,
    Threads,
    cases_of,
    device_of,
    dtypes_of,
    finish,
    measuring,
    shower,
)
from moesaic.cli.pages import ask_for_large_pages


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("decode", epilog="Example: moesaic bench decode --case fine --dtype bfloat16 --tokens 1")(decode)


def decode(
    case: Cases = None,
    dtype: Dtypes = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="At a time; may be repeated. By default 1, 4 and 16.", show_default=False),
    ] = None,
    shared: Shared = False,
    only: Only = None,
    rounds: Annotated[int, typer.Option(min=5, help="Rounds in which all take their turns.")] = 7,
    threads: Threads = None,
    device: Device = "cpu",
    out: Out = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Time decoding beside the time in which memory gives the chosen experts' weights, measured in the same run."""
    ask_for_large_pages()
    from moesaic.bench.decode import Decoding
    from moesaic.bench.decode import decode as measure

    where = device_of(device)
    plan = Decoding(
        cases=cases_of(case, where, shared=shared, quick=quick),
        dtypes=dtypes_of(dtype, where),
        tokens=tokens or (1, 4, 16),
        rounds=rounds,
        device=where,
        only=only or (),
        cold_bytes=2**20 if quick else None,
    )
    with measuring(threads) as say:
        result = measure(plan, say=say, done=shower(as_json=as_json))
    finish(result, out=out, as_json=as_json)
