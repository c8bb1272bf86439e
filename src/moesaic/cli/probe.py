"""``moesaic probe``: what experts are worth, how alike they are, how close their choices were."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moesaic.probe import Causal, HeldOut, Likeness, Margins
    from moesaic.train.load import Trained

app = typer.Typer(
    help="Measure what experts are worth, how alike they are, and how close their choices were.",
    epilog="Example: moesaic probe causal runs/a --data builtin",
    no_args_is_help=True,
)

Where = Annotated[Path, typer.Argument(help="A run folder, or a model folder.", show_default=False)]
Data = Annotated[str | None, typer.Option(help="The text to read. [default: the run's own]")]
Tokens = Annotated[int, typer.Option(help="Held-out tokens of each domain to read, at most.", min=2)]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the table to this file too.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
_SHOWN = 20


class How(StrEnum):
    """What is done to an expert."""

    off = "off"
    drop = "drop"
    swap = "swap"
    force = "force"


@app.command(epilog="Example: moesaic probe causal runs/a --how off --tokens 4096 --csv runs/a/causal.csv")
def causal(
    path: Where,
    how: Annotated[
        How,
        typer.Option(
            help="off: the next best expert takes its place; drop: its rows get nothing; swap: with the one of its "
            "layer whose load is nearest; force: every token visits it."
        ),
    ] = How.off,
    expert: Annotated[
        list[str] | None, typer.Option(help="LAYER:EXPERT, such as 0:3; again for more. [default: all]")
    ] = None,
    data: Data = None,
    tokens: Tokens = 4096,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Take experts away one by one, and measure what the loss on held-out text becomes, by domain.

    Each text is compared with itself. Intervals are of 95 %; p-values are adjusted by Benjamini and Hochberg over all
    experts and domains. Chance is what as many rows of the layer's other experts cost.
    """
    from moesaic.probe import causal as measure

    trained = _trained(path)
    with _steps("Running without experts") as step:
        result = measure(trained.model, _text(trained, data, tokens), experts=_pairs(expert), how=how.value, step=step)
    _write(csv, result.rows())
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        _show_causal(result)


@app.command(epilog="Example: moesaic probe likeness runs/a --json")
def likeness(
    path: Where,
    weights: Annotated[bool, typer.Option(help="Compare weights.")] = True,
    align: Annotated[bool, typer.Option(help="Compare weights in the best order of hidden units too.")] = True,
    compared: Annotated[int, typer.Option("--tokens", help="Tokens that every expert works on.", min=2)] = 512,
    data: Data = None,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Compare the experts of each layer pair by pair, beside experts whose weights are shuffled."""
    from moesaic.probe import likeness as measure

    trained = _trained(path)
    with _steps("Comparing experts") as step:
        text = _text(trained, data, compared)
        result = measure(trained.model, text, weights=weights, align=align, num_tokens=compared, step=step)
    _write(csv, [line for one in result for line in one.rows()])
    if as_json:
        print(json.dumps([one.to_dict() for one in result], indent=1))
    else:
        _show_likeness(result)


@app.command(epilog="Example: moesaic probe margins runs/a --tokens 4096")
def margins(
    path: Where,
    end_to_end: Annotated[bool, typer.Option(help="Run a copy of the whole model in bfloat16 too.")] = True,
    data: Data = None,
    tokens: Tokens = 4096,
    csv: Csv = None,
    as_json: Json = False,
) -> None:
    """Measure how far the last chosen expert is ahead of the first left out, and whose choice rounding turns."""
    from moesaic.probe import margins as measure

    trained = _trained(path)
    with _steps("Reading held-out text") as step:
        result = measure(trained.model, _text(trained, data, tokens), end_to_end=end_to_end, step=step)
    _write(csv, result.rows())
    if as_json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        _show_margins(result)


def _trained(path: Path) -> Trained:
    from moesaic.train import load_trained

    return load_trained(path)


def _text(trained: Trained, data: str | None, tokens: int) -> HeldOut:
    from moesaic.core.errors import ConfigError
    from moesaic.data import load_corpus
    from moesaic.probe import HeldOut

    source = data or (trained.run.config.data if trained.run else None)
    if source is None:
        raise ConfigError("A model folder does not say what it was trained on. Name the text with --data.")
    corpus = load_corpus(source)
    longest = int(getattr(trained.model.config, "max_position_embeddings", 256))
    context = trained.run.config.context if trained.run else min(256, longest)
    # Text that is all of one piece has nothing held out; then what there is must do.
    documents = corpus.held_out or corpus.train
    return HeldOut.from_documents(documents, trained.tokenizer, context=context, tokens=tokens)


def _pairs(expert: list[str] | None) -> str | list[tuple[int, int]]:
    from moesaic.core.errors import ConfigError

    if not expert:
        return "all"
    pairs = []
    for one in expert:
        layer, colon, number = one.partition(":")
        if not colon or not layer.isdigit() or not number.isdigit():
            raise ConfigError(f"--expert must be LAYER:EXPERT, two numbers from 0, got {one!r}. Use 0:3.")
        pairs.append((int(layer), int(number)))
    return pairs


@contextmanager
def _steps(what: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def step(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield step


def _write(file: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    if file is None:
        return
    import csv

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title)
    for index, name in enumerate(columns):
        drawn.add_column(name, justify="left" if index < left else "right")
    for row in rows:
        # Names of layers and domains come from files: as they are, without markup.
        drawn.add_row(*[Text(cell) for cell in row])
    Console().print(drawn)


def _show_causal(result: Causal) -> None:
    from rich.console import Console

    cells = [(effect, change) for effect in result.effects for change in effect.changes if change.domain != "all"]
    cells.sort(key=lambda cell: -abs(cell[1].nats_per_token))
    rows = []
    for effect, change in cells[:_SHOWN]:
        name = f"{effect.layer}:{effect.expert}" + ("" if effect.partner is None else f" and {effect.partner}")
        rows.append(
            (
                name,
                change.domain,
                _with_width(change.nats_per_token, change.low),
                _with_width(change.beyond, change.beyond_low),
                _number(change.beyond_p, ".1g"),
                f"{change.rows:,}",
            )
        )
    how = result.effects[0].how if result.effects else ""
    columns = ("expert", "domain", "nats/token", "beyond chance", "adj. p", "rows")
    _table(f"What the loss becomes with an expert {_IN_WORDS.get(how, how)}", columns, rows, left=2)
    console = Console()
    plain = ", ".join(f"{name} {value:.3f}" for name, value in result.nats_per_token.items())
    console.print(f"As it is, nats per token: {plain}", highlight=False, markup=False)
    console.print(
        f"At a false discovery rate of 5 %, {len(result.found())} of {result.num_tests} changes are not 0, and "
        f"{len(result.special())} are more than as many rows of the layer's other experts cost (adj. p is of that). "
        f"± spans {result.confidence:.0%}. The {len(rows)} largest are shown; --json and --csv give all.",
        highlight=False,
    )


def _with_width(value: float, low: float) -> str:
    """A value and half its interval."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.3f}" if not math.isfinite(low) else f"{value:+.3f} ±{value - low:.3f}"


_IN_WORDS = {
    "off": "switched off",
    "drop": "whose rows get nothing",
    "swap": "swapped with another of its load",
    "force": "that every token visits",
}


def _show_likeness(result: Sequence[Likeness]) -> None:
    rows = []
    for one in result:
        for name in ("weights", "aligned", "outputs", "cka"):
            pairs = getattr(one, name)
            if pairs is None:
                continue
            chance = "–" if pairs.chance is None else f"{pairs.chance:.3f}"
            spread = "–" if pairs.chance is None else f"{pairs.chance_low:.3f} to {pairs.chance_high:.3f}"
            off = [value for e, line in enumerate(pairs.value) for f, value in enumerate(line) if f > e]
            most = f"{max(off):.3f}" if off else "–"
            rows.append((str(one.layer), _MEASURES[name], f"{pairs.mean:.3f}", most, chance, spread))
    columns = ("layer", "cosine of", "mean", "most", "chance", "least to most")
    _table("How alike the experts are", columns, rows, left=2)


_MEASURES = {
    "weights": "weights",
    "aligned": "weights, aligned",
    "outputs": "outputs",
    "cka": "outputs, CKA",
}


def _show_margins(result: Margins) -> None:
    names = [one.what for one in result.layers[0].flips] if result.layers else []
    rows = [
        (
            str(layer.layer),
            _number(layer.quantiles[0.01], ".2g"),
            _number(layer.quantiles[0.5], ".2g"),
            *[f"{one.share:.2%}" for one in layer.flips],
        )
        for layer in result.layers
    ]
    tokens = result.layers[0].num_tokens if result.layers else 0
    scale = ", ".join(dict.fromkeys(layer.scale for layer in result.layers))
    columns = ("layer", "1 %", "median", *names)
    _table(f"Margins of {scale}, and {tokens:,} tokens that go to other experts", columns, rows)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
