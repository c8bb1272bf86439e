"""``moesaic zoo``: what published models are made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.core.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.zoo import ModelShape

app = typer.Typer(
    help="List published Mixture-of-Experts models: sizes, parameters, sources.",
    epilog="Example: moesaic zoo show mixtral-8x7b",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_CONTEXT = 4096


@app.callback()
def list_models(
    context: typer.Context,
    containing: Annotated[
        str, typer.Option("--filter", help="Only models whose name or citation has this in it.", show_default=False)
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List published Mixture-of-Experts models: sizes, parameters, sources."""
    if context.invoked_subcommand is not None:
        return
    from moesaic import zoo

    wanted = containing.lower()
    shapes = [zoo.get(name) for name in zoo.names()]
    shapes = [shape for shape in shapes if wanted in f"{shape.name} {shape.citation}".lower()]
    if not shapes:
        raise ConfigError(
            f"--filter must be part of a model's name or citation, got {containing!r}, which is in none of "
            f"{len(zoo.names())}. Leave it out to see all."
        )
    if as_json:
        print(json.dumps([_figures(shape) for shape in shapes], indent=1))
        return
    _table(shapes)


def _table(shapes: list[ModelShape]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moesaic.zoo.words import choice_words, difference, short

    drawn = Table(title="Counted from the shapes, and how far that is from what was published, counted alike")
    for column in ("name", "year", "layers", "width", "chosen", "total", "active", "published", "differs"):
        drawn.add_column(column, no_wrap=True, justify="left" if column == "name" else "right")
    for shape in shapes:
        gap = difference(shape)
        drawn.add_row(
            shape.name,
            str(shape.year),
            str(shape.depth),
            str(shape.width),
            choice_words(shape),
            short(shape.num_params),
            short(shape.num_active_params),
            shape.published.total if shape.published else "",
            "" if gap is None else f"{gap:+.1%}",
        )
    Console().print(drawn)


@app.command(epilog="Example: moesaic zoo show deepseek-v3")
def show(
    model: Annotated[
        str,
        typer.Argument(
            help="Name of the list, a config.json of transformers, or a folder with one.", show_default=False
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show one model: its layers, parameters by part, total and active, and how far published figures are."""
    shape = shape_named(model)
    if as_json:
        print(json.dumps(_figures(shape), indent=1))
        return
    print("\n".join(_page(shape)))


def shape_named(model: str) -> ModelShape:
    """The shape that a user means: of a name in the zoo, or of a configuration on disk.

    Args:
        model: a name, a ``config.json`` or a folder that holds one.

    Raises:
        ConfigError: if there is no such name.
        CheckpointError: if a path holds no configuration.
    """
    from moesaic import zoo

    if model in zoo.names() or not (Path(model).exists() or "/" in model or model.endswith(".json")):
        return zoo.get(model)
    from moesaic.hf.shape import shape_of_config

    return shape_of_config(model)


def _page(shape: ModelShape) -> Iterator[str]:
    from moesaic.zoo.words import short

    yield f"{shape.name} ({shape.year})" if shape.year else shape.name
    if shape.citation:
        yield shape.citation
    yield f"Sizes from: {shape.source}" + ("" if shape.checked else " (in part not checked)")
    yield ""
    vocab = f"vocabulary {shape.vocab:,}{' (one table for input and output)' if shape.tied else ''}"
    vocab = vocab if shape.vocab else "vocabulary not known"
    yield f"width {shape.width}, {vocab}, activation {shape.activation or 'not known'}"
    yield from _layers(shape)
    yield ""
    yield from _parts(shape)
    yield ""
    yield from _totals(shape)
    yield ""
    flops = shape.flops_per_token(_CONTEXT, causal=True)
    yield f"FLOPs per token forward, in a sequence of {_CONTEXT}: {short(flops)}"
    yield f"Cache of one sequence of {_CONTEXT}, bf16: {shape.cache_bytes(_CONTEXT) / 2**20:,.1f} MiB"
    for note in (shape.open, shape.published.note if shape.published else ""):
        if note:
            yield f"Note: {note}"


def _layers(shape: ModelShape) -> Iterator[str]:
    from moesaic.zoo.words import feed_words, mixer_words, placement

    for title, stack in (("encoder", shape.encoder), ("decoder" if shape.encoder else "layers", shape.layers)):
        if not stack:
            continue
        yield f"{title}, {len(stack)}:"
        for places, layer in placement(stack):
            parts = [mixer_words(one) for one in layer.mixers] + [feed_words(one) for one in layer.feeds]
            yield f"  {places:<22}{'; '.join(parts)}"


def _parts(shape: ModelShape) -> Iterator[str]:
    total, active = shape.params(), shape.params(active=True)
    yield f"{'parameters':<14}{'all':>22}{'for one token':>22}"
    for name, count in total.as_dict().items():
        if count:
            yield f"  {name:<12}{count:>22,}{active.as_dict()[name]:>22,}"
    yield f"  {'total':<12}{total.total:>22,}{active.total:>22,}"


def _totals(shape: ModelShape) -> Iterator[str]:
    from moesaic.zoo.words import difference

    published = shape.published
    for title, is_active in (("total", False), ("active", True)):
        counted = [
            f"{shape.num_params_without(left_out, active=is_active):,} without {left_out}"
            for left_out in ("input embedding", "embeddings")
        ]
        yield f"{title}: {shape.num_params_without('nothing', active=is_active):,}; {'; '.join(counted)}"
        printed = "" if published is None else published.active if is_active else published.total
        gap = difference(shape, active=is_active)
        if published is None or gap is None:
            continue
        left_out = published.active_without if is_active else published.total_without
        counting = "" if left_out == "nothing" else f" without {left_out}"
        doubt = "" if published.checked else "; not checked there"
        yield f"  published {printed}{counting} ({published.source}{doubt}): counted {gap:+.2%} of it"


def _figures(shape: ModelShape) -> dict[str, Any]:
    from moesaic.zoo.words import difference, placement

    def stack(layers: Any) -> list[dict[str, Any]]:
        return [
            {
                "at": places,
                "count": layers.count(layer),
                "mixers": [{"kind": type(one).__name__, **asdict(one)} for one in layer.mixers],
                "feeds": [{"kind": type(one).__name__, **asdict(one)} for one in layer.feeds],
            }
            for places, layer in placement(layers)
        ]

    return {
        "name": shape.name,
        "year": shape.year,
        "citation": shape.citation,
        "source": shape.source,
        "checked": shape.checked,
        "width": shape.width,
        "vocab": shape.vocab,
        "tied": shape.tied,
        "encoder": stack(shape.encoder),
        "layers": stack(shape.layers),
        "num_params": shape.num_params,
        "num_active_params": shape.num_active_params,
        "num_params_without_embeddings": shape.num_params_without("embeddings"),
        "num_active_params_without_embeddings": shape.num_params_without("embeddings", active=True),
        "params": shape.params().as_dict(),
        "active_params": shape.params(active=True).as_dict(),
        "flops_per_token": shape.flops_per_token(_CONTEXT, causal=True),
        "cache_bytes": shape.cache_bytes(_CONTEXT),
        "context": _CONTEXT,
        "published": None if shape.published is None else asdict(shape.published),
        "total_differs": difference(shape),
        "active_differs": difference(shape, active=True),
        "open": shape.open,
    }
