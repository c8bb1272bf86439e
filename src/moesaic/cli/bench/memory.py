"""``moesaic bench memory``: what a training step keeps and holds."""

from __future__ import annotations

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
    cases_of,
    device_of,
    dtypes_of,
    finish,
    measuring,
    shower,
)


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("memory", epilog="Example: moesaic bench memory --case fine --dtype bfloat16")(memory)


def memory(
    case: Cases = None,
    dtype: Dtypes = None,
    shared: Shared = False,
    only: Only = None,
    device: Device = "cpu",
    out: Out = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Measure the memory of a training step: what is kept for the backward, and the peak."""
    from moesaic.bench.memory import memory as measure

    where = device_of(device)
    cases = cases_of(case, where, shared=shared, quick=quick)
    with measuring(None) as say:
        result = measure(cases, dtypes_of(dtype, where), where, only=only or (), say=say, done=shower(as_json=as_json))
    finish(result, out=out, as_json=as_json)
