"""``moesaic plan``: what a model needs and how fast it can be at best, before a device is rented."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moesaic.core.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.plan import Job, ServeJob, ServingPlan, TrainingPlan
    from moesaic.plan.devices import Device
    from moesaic.plan.layout import Layout
    from moesaic.plan.popularity import Popularity
    from moesaic.plan.tables import Table
    from moesaic.zoo import ModelShape


Shard = Literal["all", "optimizer"]
Dispatch = Literal["once-per-node", "per-choice"]


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    train = "Example: moesaic plan mixtral-8x7b --device h100-80g --devices 64 --ep 8 --pp 4"
    serve = "moesaic plan qwen3-30b-a3b --serve --batch 1,16,256"
    app.command("plan", epilog=f"{train}. {serve}. moesaic plan deepseek-v2-lite --search --devices 16")(plan)


def plan(
    models: Annotated[
        list[str] | None, typer.Argument(help="Of the zoo, or config.json files or their folders.")
    ] = None,
    training: Annotated[bool, typer.Option("--train/--serve", help="What the devices do.")] = True,
    device: Annotated[str, typer.Option(help="A device; an unknown name lists them.")] = "h100-80g",
    devices: Annotated[int, typer.Option(help="How many.", min=1)] = 8,
    tp: Annotated[int, typer.Option(help="Devices that a matrix outside of experts is cut over.", min=1)] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages.", min=1)] = 1,
    ep: Annotated[int, typer.Option(help="Devices that the experts of a layer are dealt out to.", min=1)] = 1,
    fsdp: Annotated[int, typer.Option(help="Data-parallel ranks that split states.", min=1)] = 1,
    shard: Annotated[Shard, typer.Option(help="What they split: all (FSDP), or the optimizer (ZeRO-1).")] = "all",
    uneven: Annotated[bool, typer.Option("--uneven", help="Let stages differ by one layer.")] = False,
    interleave: Annotated[int, typer.Option(help="Pieces of a stage that are run in turns.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.", min=1)] = 4096,
    batch: Annotated[str, typer.Option(help="Sequences of a step; to serve: at once, such as 1,16,256.")] = "",
    micro_batch: Annotated[int, typer.Option(help="Sequences that a rank trains on at once.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp8; to serve int8, mxfp4 or int4 too.")] = "bf16",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-bf16, momentum or sgd.")] = "adamw",
    recompute: Annotated[bool, typer.Option("--recompute", help="Compute layers anew in the backward.")] = False,
    routing: Annotated[str, typer.Option(help="uniform, zipf:1.1, or the path of a routing trace.")] = "uniform",
    capacity: Annotated[float | None, typer.Option(help="Capacity factor; without it nothing is dropped.")] = None,
    dispatch: Annotated[Dispatch, typer.Option(help="When a token is copied.")] = "once-per-node",
    fast_memory: Annotated[float | None, typer.Option(help="GB of device memory; experts wait in the host's.")] = None,
    experts: Annotated[int | None, typer.Option(help="Another number of experts in each layer.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Another number of choices.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Rank the layouts that fit.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Put several models side by side.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Measure real steps here against the prediction.")] = False,
    published: Annotated[bool, typer.Option("--published", help="Set bounds beside published runs.")] = False,
    out: Annotated[Path | None, typer.Option("--plot", help="A picture to write: .svg, .png or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Say what training or serving takes: memory, FLOPs, traffic, time at best, and what binds.

    Memory is that of the fullest device, at the mean load of the routing and at one that it exceeds in 1 of 100
    micro-batches. Times are bounds from what makers state: no run is faster, and most are slower by half or more.
    """
    if verify or published:
        (_verify if verify else _published)(as_json)
        return
    shapes = _shapes(models or [], compare, experts, top_k)
    layout = _layout(devices, tp, pp, ep, fsdp, shard, uneven, interleave)
    what = _request(device, layout, routing, search, out, as_json)
    if training:
        job = _job(context, batch, micro_batch, dtype, optimizer, recompute)
        _train(shapes, what, job, capacity, dispatch, fast_memory)
    else:
        _serve(shapes, what, _serve_job(context, batch, dtype), fast_memory)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked for, whatever the devices do."""

    device: Device
    layout: Layout
    popularity: Popularity
    search: bool
    out: Path | None
    as_json: bool


def _request(device: str, layout: Layout, routing: str, search: bool, out: Path | None, as_json: bool) -> Request:
    from moesaic.plan import read_routing
    from moesaic.plan.devices import get

    return Request(
        device=get(device),
        layout=layout,
        popularity=read_routing(routing),
        search=search,
        out=out,
        as_json=as_json,
    )


def _layout(devices: int, tp: int, pp: int, ep: int, fsdp: int, shard: Shard, uneven: bool, interleave: int) -> Layout:
    from moesaic.plan import Layout

    return Layout(devices=devices, tp=tp, pp=pp, ep=ep, fsdp=fsdp, shard=shard, uneven=uneven, interleave=interleave)


def _shapes(models: list[str], compare: bool, experts: int | None, top_k: int | None) -> list[ModelShape]:
    if not models:
        raise ConfigError("A model was needed, got none. Try mixtral-8x7b; moesaic zoo lists the others.")
    if compare and len(models) < 2:
        raise ConfigError(f"--compare needs at least 2 models, got {models[0]} alone. Name another one.")
    if not compare and len(models) > 1:
        raise ConfigError(
            f"One model can be planned at a time, got {len(models)}. Add --compare to set them side by side."
        )
    from moesaic.plan import changed, find

    return [changed(find(text), num_experts=experts, top_k=top_k) for text in models]


def _job(context: int, batch: str, micro_batch: int, dtype: str, optimizer: str, recompute: bool) -> Job:
    from moesaic.plan import Job

    sizes = _numbers(batch)
    if len(sizes) > 1:
        raise ConfigError(f"--batch for training must be one number, got {batch!r}. Give the sequences of one step.")
    return Job(
        context=context,
        batch=sizes[0] if sizes else None,
        micro_batch=micro_batch,
        dtype=dtype,
        optimizer=optimizer,
        recompute=recompute,
    )


def _serve_job(context: int, batch: str, dtype: str) -> ServeJob:
    from moesaic.plan import ServeJob

    sizes = _numbers(batch)
    job = ServeJob(context=context, dtype=dtype)
    return replace(job, batches=sizes) if sizes else job


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError as error:
        raise ConfigError(f"--batch must be numbers such as 64 or 1,16,256, got {text!r}. Leave out spaces.") from error


def _train(
    shapes: list[ModelShape],
    what: Request,
    job: Job,
    capacity: float | None,
    dispatch: Dispatch,
    fast_memory: float | None,
) -> None:
    from moesaic.plan import ranking, tables, train

    if fast_memory is not None:
        raise ConfigError(f"--fast-memory {fast_memory:g} is for serving, and --serve was not given. Add --serve.")
    if what.search:
        for shape in shapes:
            with progress(f"Layouts of {shape.name}") as say:
                found = ranking.search(shape, what.device, what.layout.devices, job, what.popularity, say=say)
            _show([[_training_json(plan) for plan in found.plans]], [tables.search_table(found)], (), what.as_json)
            if found.plans and what.out is not None:
                _draw(found.plans[:1], what.out, what.as_json)
        return
    plans = [
        train(shape, what.device, what.layout, job, what.popularity, capacity_factor=capacity, dispatch=dispatch)
        for shape in shapes
    ]
    shown = [tables.compare_table(plans)] if len(plans) > 1 else list(tables.training_tables(plans[0]))
    _show([_training_json(plan) for plan in plans], shown, plans[0].assumes, what.as_json)
    if what.out is not None:
        _draw(plans, what.out, what.as_json)


def _serve(shapes: list[ModelShape], what: Request, job: ServeJob, fast_memory: float | None) -> None:
    from moesaic.plan import offload, ranking, serve, tables

    if fast_memory is not None:
        for shape in shapes:
            found = offload(
                shape,
                what.device,
                what.popularity,
                fast_bytes=fast_memory * 1e9,
                context=job.context,
                dtype=job.dtype,
            )
            _show([asdict(found)], [tables.offload_table(found)], (), what.as_json)
        return
    if what.search:
        for shape in shapes:
            with progress(f"Layouts of {shape.name}") as say:
                ranked = ranking.search_serving(shape, what.device, what.layout.devices, job, what.popularity, say=say)
            shown = [tables.search_serving_table(ranked)]
            _show([[asdict(plan) for plan in ranked.plans]], shown, (), what.as_json)
        return
    plans = [serve(shape, what.device, what.layout, job, what.popularity) for shape in shapes]
    shown = [tables.compare_table(plans)] if len(plans) > 1 else list(tables.serving_tables(plans[0]))
    _show([asdict(plan) for plan in plans], shown, plans[0].assumes, what.as_json)
    if what.out is not None:
        _draw(plans, what.out, what.as_json)


def _training_json(plan: TrainingPlan) -> dict[str, Any]:
    """All that was planned, and what follows from it."""
    return {
        **asdict(plan),
        "fits": plan.fits,
        "memory_total": plan.memory.total,
        "memory_p99_total": plan.memory_p99.total,
        "step_s_bound": plan.times.bound,
        "step_s_nothing_overlaps": plan.times.in_turn,
        "binds": plan.times.binds,
        "tokens_per_s_bound": plan.tokens_per_s(),
        "mfu_bound": plan.mfu(),
        "mfu_nothing_overlaps": plan.mfu(plan.times.in_turn),
    }


def _draw(plans: Sequence[TrainingPlan] | Sequence[ServingPlan], out: Path, as_json: bool) -> None:
    from moesaic.plan.plot import plot

    path = plot(plans, out)
    if not as_json:
        typer.echo(f"Picture: {path}")


def _show(
    figures: list[Any], shown: Sequence[Table], notes: Sequence[str], as_json: bool, head: str = "Assumes:"
) -> None:
    if as_json:
        print(json.dumps(figures[0] if len(figures) == 1 else figures, indent=1))
        return
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console()
    for table in shown:
        drawn = Drawn(title=table.title)
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if number == 0 else "right")
        for row in table.rows:
            last = row[0].startswith(("total", "bound"))
            drawn.add_row(*row, style="bold" if last else None)
        console.print(drawn)
    if notes:
        console.print(head)
        for line in notes:
            console.print(f"- {line}", highlight=False)


def _verify(as_json: bool) -> None:
    from moesaic.plan import tables, verify

    with progress("Training steps") as say:
        count = 2 * len(verify.cases())
        found = []
        for one in verify.verify():
            found.append(one)
            say(len(found), count)
    figures = [{**asdict(one), "predicted": one.predicted, "measured": one.measured} for one in found]
    _show([figures], [tables.verify_table(found)], verify.ABOUT, as_json, "How:")


def _published(as_json: bool) -> None:
    from moesaic.plan import published, tables

    found = published.standings()
    _show([[asdict(one) for one in found]], [tables.published_table(found)], published.ABOUT, as_json, "How:")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far a count has come, on standard error and only where somebody looks."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, count: bar.update(task, completed=done, total=count)
