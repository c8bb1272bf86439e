"""``moesaic bench model``: whole models in training."""

from __future__ import annotations

from typing import Annotated

import typer

from moesaic.cli.bench.options import (
    AsJson,
    Cases,
    Device,
    Dtypes,
    Out,
    Quick,
    Rounds,
    Threads,
    cases_of,
    device_of,
    dtypes_of,
    finish,
    measuring,
    shower,
)


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("model", epilog="Example: moesaic bench model --case coarse --dtype bfloat16")(model)


def model(
    case: Cases = None,
    dtype: Dtypes = None,
    layers: Annotated[int, typer.Option(min=1, help="Of a model.")] = 4,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 256,
    vocab: Annotated[int, typer.Option(min=2, help="Size of the vocabulary.")] = 4096,
    tokens: Annotated[int, typer.Option(min=2, help="Of a step.")] = 2048,
    rounds: Rounds = 5,
    threads: Threads = None,
    device: Device = "cpu",
    out: Out = None,
    quick: Quick = False,
    as_json: AsJson = False,
) -> None:
    """Train a sparsified model beside its dense twin, and an adopted model beside transformers' implementations."""
    from moesaic.bench.model import Modelling
    from moesaic.bench.model import model as measure

    where = device_of(device)
    plan = Modelling(
        cases=cases_of(case or ["coarse", "fine"], where, shared=False, quick=quick, num_tokens=tokens),
        dtypes=dtypes_of(dtype, where),
        layers=1 if quick else layers,
        context=16 if quick else context,
        vocab_size=64 if quick else vocab,
        rounds=rounds,
        device=where,
    )
    with measuring(threads) as say:
        result = measure(plan, say=say, done=shower(as_json=as_json))
    finish(result, out=out, as_json=as_json)
