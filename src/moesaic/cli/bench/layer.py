"""``moesaic bench layer``: training step and forward of one layer."""

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
    Rounds,
    Shared,
    Threads,
    cases_of,
    device_of,
    dtypes_of,
    finish,
    measuring,
    shower,
)

Modes = Annotated[
    list[str] | None, typer.Option("--mode", help="train or forward. May be repeated.", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("layer", epilog="Example: moesaic bench layer --case fine --dtype float32")(layer)


def layer(
    case: Cases = None,
    dtype: Dtypes = None,
    mode: Modes = None,
    shared: Shared = False,
    zipf: Annotated[float, typer.Option(min=0, help="Skew of the load: 0 is balanced, 1 Zipf's law.")] = 0.0,
    only: Only = None,
    parts: Annotated[bool, typer.Option(help="Take our step apart into router, dispatch and experts.")] = True,
    tokens: Annotated[int | None, typer.Option(min=1, help="T.", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="D.", show_default=False)] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="F of one expert.", show_default=False)] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="E.", show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="K.", show_default=False)] = None,
    rounds: Rounds = 5,
    threads: Threads = None,
    device: Device = "cpu",
    out: Out = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Time a training step and a forward of one layer: ours, transformers', and the dense layer of equal FLOPs.

    Without a case, sizes, --shared or --zipf: the whole library, the fine case also with a shared expert and skewed.
    """
    from moesaic.bench.case import BIG_FINE, FINE, variants
    from moesaic.bench.layer import Plan, modes_of
    from moesaic.bench.layer import layer as measure

    where = device_of(device)
    sizes = {"num_tokens": tokens, "width": width, "hidden": hidden, "num_experts": experts, "top_k": top_k}
    given = {"zipf": zipf or None, **sizes}
    dtypes = dtypes_of(dtype, where)
    is_default = not (case or shared or any(value is not None for value in given.values()))
    extras = variants(FINE if device == "cpu" else BIG_FINE) if is_default else ()
    plan = Plan(
        cases=cases_of(case, where, shared=shared, quick=quick, **given),
        dtypes=dtypes,
        extras=[(one.tiny() if quick else one, dtypes[-1]) for one in extras],
        modes=modes_of(mode or ["train", "forward"]),
        rounds=rounds,
        device=where,
        only=only or (),
        parts=parts,
    )
    with measuring(threads) as say:
        result = measure(plan, say=say, done=shower(as_json=as_json))
    finish(result, out=out, as_json=as_json)
