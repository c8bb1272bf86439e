"""Mixtures beside today's learners as a page: a table for each set of rows, and where to use which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.lab.classic.drawn import svg
from moesaic.lab.classic.tabular import Contender, Table, Tabular
from moesaic.lab.page import text
from moesaic.lens import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Folds = Sequence[Mapping[str, Any]]
Found = Mapping[str, Mapping[str, Folds]]

MIXTURES = ("adaptive mixture", "hierarchical mixture")


def write(found: Found, experiment: Tabular, tables: Sequence[Table], page: Path) -> list[Path]:
    """Write the page and its picture; give both.

    Raises:
        BackendError: without matplotlib.
    """
    drawing = page.with_suffix(".svg")
    text(drawing, svg("tabular", (7.2, 3.4), lambda figure: _paint(figure, found)))
    text(page, words(found, experiment, tables, drawing.name))
    return [page, drawing]


def words(found: Found, experiment: Tabular, tables: Sequence[Table], drawing: str) -> str:
    """The page.

    Args:
        found: folds, by table and learner.
        experiment: what was done.
        tables: with what.
        drawing: name of the picture beside it.
    """
    lines = [*_head(experiment, drawing), *_summary(found, tables)]
    for table in tables:
        lines += _section(found[table.name], table)
    return "\n".join([*lines, *_limits(tables)]) + "\n"


def _head(experiment: Tabular, drawing: str) -> Iterator[str]:
    yield from (
        "# Beside today's choices",
        "",
        "What the mixtures of 1991 and 1994 are worth on tables beside what one takes today, by `moesaic lab tabular`.",
        "",
        f"![Error of each learner over that of the best one, and seconds to fit]({drawing})",
        "",
        "- *Error* is the squared error over the variance of the target, or the share of wrong classes. *Log-density*",
        "  is of a row that was not seen, on average, higher is better; whoever predicts numbers alone gets a Gaussian",
        "  as wide as its errors on held-out rows.",
        "- Everybody has the same folds, and may choose among the settings below by the error on a fifth of its",
        "  training rows. All else is as the libraries have it; linear models and networks get scaled inputs.",
        f"- Mixtures and joint Gaussians are fitted from {experiment.starts} beginnings, of which the likeliest is",
        "  kept; that is in their time.",
        "- *Joint Gaussians* are scikit-learn's `GaussianMixture` of inputs and target together, read as the",
        "  distribution of the target given the inputs.",
        "- Seconds are what one core worked for the last fit, and to predict the rows that were not seen.",
        "- **Bold** is the best, and whoever is no more than one standard error of the differences between folds away.",
        "",
        "| learner | chooses among |",
        "|---|---|",
    )
    for one in experiment.contenders():
        yield f"| {one.name} | {one.setting_words}: {_settings(one)} |"


def _settings(one: Contender) -> str:
    return "; ".join(
        " × ".join(map(str, setting)) if isinstance(setting, tuple) else f"{setting:g}" for setting in one.settings
    )


def _summary(found: Found, tables: Sequence[Table]) -> Iterator[str]:
    yield from (
        "",
        "## Where to use which",
        "",
        "| table | least error | likeliest | error of the better mixture over the least | its seconds | the best's |",
        "|---|---|---|---|---|---|",
    )
    for table in tables:
        here = found[table.name]
        by_error, by_density = _near(here, "error", -1), _near(here, "log_density", 1)
        best = min(here, key=lambda name: _mean(here[name], "error"))
        ours = min(MIXTURES, key=lambda name: _mean(here[name], "error"))
        ratio = _mean(here[ours], "error") / _mean(here[best], "error")
        times = f"{_seconds(here[ours], 'fit_s')} | {_seconds(here[best], 'fit_s')}"
        yield f"| {table.name} | {', '.join(by_error)} | {', '.join(by_density)} | {ratio:.2f} ({ours}) | {times} |"


def _section(here: Mapping[str, Folds], table: Table) -> Iterator[str]:
    splits = f"{table.folds} folds" + (f", {table.repeats} times" if table.repeats > 1 else "")
    yield from (
        "",
        f"## {table.name}",
        "",
        f"{table.words[0].upper()}{table.words[1:]}. {splits}.",
        "",
        "| learner | error | log-density | seconds to fit | to predict | setting most chosen |",
        "|---|---|---|---|---|---|",
    )
    by_error, by_density = _near(here, "error", -1), _near(here, "log_density", 1)
    for name, folds in here.items():
        error, density = f"{_mean(folds, 'error'):.3f}", f"{round(_mean(folds, 'log_density'), 2) + 0.0:.2f}"
        chosen = [fold["setting"] for fold in folds]
        most = max(sorted(set(chosen)), key=chosen.count).strip("(),").replace(", ", " × ")
        yield (
            f"| {name} | {_bold(error, name in by_error)} | {_bold(density, name in by_density)} "
            f"| {_seconds(folds, 'fit_s')} | {_seconds(folds, 'predict_s')} | {most} |"
        )


def _near(here: Mapping[str, Folds], figure: str, sign: int) -> list[str]:
    """The best, and those that are no more than one standard error of their differences from it, fold by fold."""
    best = max(here, key=lambda name: sign * _mean(here[name], figure))

    def is_near(name: str) -> bool:
        behind = np.array([sign * (a[figure] - b[figure]) for a, b in zip(here[best], here[name], strict=True)])
        return name == best or bool(behind.mean() <= behind.std(ddof=1) / np.sqrt(len(behind)))

    return [name for name in here if is_near(name)]


def _mean(folds: Folds, figure: str) -> float:
    return fmean(fold[figure] for fold in folds)


def _seconds(folds: Folds, figure: str) -> str:
    return f"{median(fold[figure] for fold in folds):.2g}"


def _bold(word: str, is_bold: bool) -> str:
    return f"**{word}**" if is_bold else word


def _limits(tables: Sequence[Table]) -> Iterator[str]:
    yield from (
        "",
        "## What this does not show",
        "",
        "- Folds of the same rows are not independent, and some tables have but two of them: a standard error over",
        "  them says who is close, no more.",
        "- Trees and networks with settings searched for longer, and libraries for boosting beside scikit-learn's.",
    )
    if any("drawn" in table.words for table in tables):
        yield "- The two drawn tables have the size of California's houses, not their content."


def _paint(figure: Figure, found: Found) -> None:
    names = list(dict.fromkeys(name for here in found.values() for name in here))
    left, right = figure.subplots(1, 2, sharey=True)
    colours = [light for light, _ in palette.expert_colours(len(found))]
    for (table, here), colour in zip(found.items(), colours, strict=True):
        least = min(_mean(folds, "error") for folds in here.values())
        there = [names.index(name) for name in here]
        for axes, values in (
            (left, [_mean(folds, "error") / least for folds in here.values()]),
            (right, [median(fold["fit_s"] for fold in folds) for folds in here.values()]),
        ):
            axes.plot(values, there, "o", color=colour, markersize=4.5, label=table)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            axes.grid(axis="x")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_title("error over that of the best")
    right.set_title("seconds to fit")
    right.legend(fontsize=6.5, loc="best", handlelength=1)
