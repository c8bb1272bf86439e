"""``moesaic lab``: experiments that test what the literature claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesaic.lab import Outcome

app = typer.Typer(
    help="Run the experiments: what the literature claims, tested small enough for a laptop.",
    epilog="Example: moesaic lab balance",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, ...")]


@app.command(epilog="Example: moesaic lab gallery --recipe switch --recipe mixtral --seeds 1 --out gallery.md")
def gallery(
    out: Annotated[Path, typer.Option(help="The page; its figures go beside it as JSON.")] = Path("gallery.md"),
    recipe: Annotated[list[str] | None, typer.Option(help="Train this one; may be repeated. By default all.")] = None,
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run, of 2,048 tokens.")] = 200,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each on one thread.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Train every recipe on the same tokens with the same active parameters, and write a page that compares them."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from moesaic import recipes
    from moesaic.lab.gallery import gallery as run
    from moesaic.lab.gallery import write
    from moesaic.lab.small import TWIN, Setup

    names = [TWIN, *(recipe or recipes.names())]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=len(names) * seeds)

        def done(one: Outcome) -> None:
            progress.update(task, advance=1, description=f"{one.recipe}, seed {one.seed}: {one.bits_per_byte:.3f}")

        result = run(names=names, seeds=range(seeds), setup=Setup(steps=steps), jobs=jobs, done=done)
    write(result, out)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        console.print(f"Wrote {out} and {out.with_suffix('.json')}.", highlight=False, soft_wrap=True)


@app.command(epilog="Example: moesaic lab balance --json")
def balance(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and data.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Start from a router that has collapsed on two experts: how far does each balance term bring the load back?"""
    from moesaic.lab.balance import every_term

    results = every_term(steps=steps, seed=seed)
    if as_json:
        print(json.dumps([result.to_dict() for result in results], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=f"Busiest expert over mean, after {steps} steps from a collapsed router")
    for column in ("term", "recipe", "at the start", "without the term", "with it"):
        drawn.add_column(column)
    for one in results:
        drawn.add_row(one.term, one.recipe, f"{one.before:.2f}", f"{one.without:.2f}", f"{one.after:.2f}")
    Console().print(drawn)


@app.command(epilog="Example: moesaic lab precision --seeds 1")
def precision(seeds: Seeds = 3, as_json: AsJson = False) -> None:
    """Train in bfloat16: does the z-loss keep logits small, and whom does a router in bfloat16 send elsewhere?"""
    from moesaic.lab.precision import precision as run

    results = run(seeds=range(seeds))
    if as_json:
        print(json.dumps([result.to_dict() for result in results], indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title="bfloat16 training, before and after")
    for column in ("recipe", "variant", "seed", "logsumexp squared", "largest logit", "other choices", "bits per byte"):
        drawn.add_column(column)
    for one in results:
        drawn.add_row(
            one.recipe,
            one.variant,
            str(one.seed),
            "{:.2f} to {:.2f}".format(*one.squared_logsumexp),
            "{:.2f} to {:.2f}".format(*one.largest_logit),
            f"{one.changed_choices:.2%}",
            f"{one.bits_per_byte:.3f}",
        )
    Console().print(drawn)
