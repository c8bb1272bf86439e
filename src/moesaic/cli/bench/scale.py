"""``moesaic bench scale``: time of a token against tokens, experts and skew."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli.bench.options import (
    AsJson,
    Device,
    Dtypes,
    Out,
    Quick,
    Rounds,
    Threads,
    device_of,
    dtypes_of,
    finish,
    measuring,
    shower,
)


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("scale", epilog="Example: moesaic bench scale --dtype bfloat16")(scale)


def scale(
    dtype: Dtypes = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="T; may be repeated. By default 1k to 64k.", show_default=False)
    ] = None,
    experts: Annotated[
        list[int] | None, typer.Option(min=1, help="E; may be repeated. By default 8 to 256.", show_default=False)
    ] = None,
    zipf: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Skews; may be repeated. By default 0.5, 1 and 1.5.", show_default=False),
    ] = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    device: Device = "cpu",
    out: Out = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Time a token in growing batches, with growing numbers of experts at equal active FLOPs, and under skew."""
    from moesaic.bench.case import FINE
    from moesaic.bench.scale import Scaling
    from moesaic.bench.scale import scale as measure

    where = device_of(device)
    plan = Scaling(
        base=FINE.tiny() if quick else FINE,
        dtypes=dtypes_of(dtype, where),
        tokens=tokens or ((32, 64) if quick else (1024, 4096, 16384, 65536)),
        experts=experts or ((8, 16) if quick else (8, 16, 32, 64, 128, 256)),
        skews=zipf or (0.5, 1.0, 1.5),
        rounds=rounds,
        device=where,
    )
    with measuring(threads) as say:
        result = measure(plan, say=say, done=shower(as_json=as_json))
    finish(result, out=out, as_json=as_json)
