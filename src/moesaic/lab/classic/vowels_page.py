"""The vowels of 1991 as a page: the paper's table, measured again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.lab.classic.drawn import svg
from moesaic.lab.classic.vowels import CRITERION, TRAINING_SPEAKERS, Learner, Speech, Vowels, trained
from moesaic.lab.page import text
from moesaic.lens import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = Mapping[str, Sequence[Mapping[str, Any]]]

PUBLISHED = {
    "4 experts": (88, 90, 1124, 23),
    "8 experts": (88, 90, 1083, 12),
    "network, 6 hidden": (88, 90, 2209, 83),
    "network, 12 hidden": (88, 90, 2435, 124),
}
"""Training and test per cent, passes and their standard error, as printed."""


def write(found: Found, vowels: Vowels, speech: Speech, source: str, page: Path) -> list[Path]:
    """Write the page and its picture; give both.

    Raises:
        BackendError: without matplotlib.
    """
    drawing = page.with_suffix(".svg")
    text(drawing, svg("vowels", (7.2, 3.6), lambda figure: _paint(figure, found, vowels, speech)))
    text(page, words(found, vowels, source, drawing.name))
    return [page, drawing]


def words(found: Found, vowels: Vowels, source: str, drawing: str) -> str:
    """The page.

    Args:
        found: runs of each learner.
        vowels: the experiment.
        source: of the vowels, in words.
        drawing: name of the picture beside it.
    """
    return "\n".join([*_head(vowels, source, drawing), *_table(found, vowels), *_verdict(found), *_limits()]) + "\n"


def _head(vowels: Vowels, source: str, drawing: str) -> Iterator[str]:
    yield from (
        "# Vowels, 1991",
        "",
        "The first experiment with a mixture of experts: four vowels by their first two formants, by `moesaic lab",
        "vowels`. [i] and [ɪ] overlap, and so do [ɑ] and [ʌ]. One output tells the first of each pair from the second:",
        "no line can, two lines can, if something says which of them is to be asked. The paper's networks have as many",
        "parameters as its mixtures only if there is one output, which is why there is one here.",
        "",
        f"![Two experts share the vowels; passes of every learner]({drawing})",
        "",
        f"- Formants in kilohertz, {source}; the first {TRAINING_SPEAKERS} speakers to train, the others to test.",
        "- Batch gradient descent, one update in each pass, no momentum; training ends when the squared error of the",
        f"  output is {CRITERION} on average. Steps were chosen for each learner among "
        f"{', '.join(f'{step:g}' for step in vowels.steps)} by {vowels.search} runs with other seeds.",
        f"- {vowels.runs} runs of each, with other random numbers at the start; ± is the standard deviation over runs.",
        "- An expert is alive if its share of the training rows, by the gate, is above 1 % at the end.",
    )


def _table(found: Found, vowels: Vowels) -> Iterator[str]:
    yield from (
        "",
        "| learner | parameters | step | training | test | passes | published | experts alive |",
        "|---|---|---|---|---|---|---|---|",
    )
    for learner in vowels.learners:
        runs = found[learner.name]
        there = [run["passes"] for run in runs if run["arrived"]]
        passes = f"{fmean(there):,.0f} ± {_spread(there):,.0f}" if there else "–"
        if len(there) < len(runs):
            passes += f" ({len(runs) - len(there)} of {len(runs)} did not arrive in {vowels.most:,})"
        shares = " | ".join(f"{100 * fmean(run[part] for run in runs):.1f} %" for part in ("train", "test"))
        paper = "{}, {} %; {:,} ± {}".format(*PUBLISHED[learner.name]) if learner.name in PUBLISHED else ""
        yield (
            f"| {learner.name} | {learner.num_params} | {runs[0]['step']:g} | {shares} | {passes} | {paper} | "
            f"{_alive(learner, runs)} |"
        )


def _alive(learner: Learner, runs: Sequence[Mapping[str, Any]]) -> str:
    if learner.num_experts == 1:
        return ""
    counts = sorted({run["alive"] for run in runs})
    return ", ".join(f"{count} in {sum(run['alive'] == count for run in runs)}" for count in counts)


def _verdict(found: Found) -> Iterator[str]:
    from scipy.stats import ttest_ind

    yield from (
        "",
        "Is the mixture twice as fast, as in the paper? Mean passes of networks over those of mixtures:",
        "",
    )
    yield "| | 4 experts | 8 experts |"
    yield "|---|---|---|"
    for name in (name for name in found if name.startswith("network")):
        cells = []
        for mixture in ("4 experts", "8 experts"):
            theirs, ours = ([run["passes"] for run in found[one] if run["arrived"]] for one in (name, mixture))
            if min(len(theirs), len(ours)) < 2:
                cells.append("–")
                continue
            p = float(ttest_ind(theirs, ours, equal_var=False).pvalue)
            cells.append(f"{fmean(theirs) / fmean(ours):.2f} (p {'< 0.0001' if p < 1e-4 else f'= {p:.4f}'})")
        yield f"| {name} | {' | '.join(cells)} |"


def _limits() -> Iterator[str]:
    yield from (
        "",
        "The paper gives neither its steps nor the size of its first weights, and both decide how many passes there",
        "are: a network that starts with small weights has to find its way out first. So the ratio is what its",
        "settings make it. What did not depend on them here is that all experts but two fall silent. In the picture",
        "one of the two has its line in the lower pair, and the gate itself parts the upper one.",
    )


def _paint(figure: Figure, found: Found, vowels: Vowels, speech: Speech) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    _paint_regions(left, found, vowels, speech)
    names = [name for name in found if any(run["arrived"] for run in found[name])]
    for row, name in enumerate(reversed(names)):
        passes = [run["passes"] for run in found[name] if run["arrived"]]
        colour = palette.SPARSE if "experts" in name else palette.DENSE
        right.plot(passes, [row] * len(passes), "o", color=colour, markersize=3, alpha=0.45, markeredgewidth=0)
        right.plot(fmean(passes), row, "|", color=palette.INK, markersize=11)
    right.set_yticks(range(len(names)), [_short(name) for name in reversed(names)])
    right.tick_params(axis="y", labelsize=6.5, labelcolor=palette.INK)
    right.set_xlabel("passes until the criterion is met")
    right.grid(axis="x")


def _paint_regions(axes: Axes, found: Found, vowels: Vowels, speech: Speech) -> None:
    """One mixture at its end: who is asked where, and at which line that expert changes its mind."""
    learner = vowels.learners[0]
    mixture = trained(learner, speech, found[learner.name][0]["step"], 0, vowels.most)[0]
    across, up = (np.linspace(low - 0.05, high + 0.05, 200) for low, high in zip(*_bounds(speech), strict=True))
    mesh = np.meshgrid(across, up)
    rows = np.stack([one.ravel() for one in mesh] + [np.ones(mesh[0].size)], axis=1)
    owner = mixture.log_gate(rows).argmax(axis=1).reshape(mesh[0].shape)
    told = mixture.means(rows)[..., 0]
    colours = [palette.SPARSE, palette.MORE, palette.OTHERS[0], palette.OTHERS[1]]
    for expert in range(learner.num_experts):
        mine = owner == expert
        if not mine.any():
            continue
        axes.contourf(*mesh, mine, levels=[0.5, 1.5], colors=[colours[expert % 4]], alpha=0.15)
        line = np.where(mine, told[:, expert].reshape(mesh[0].shape), np.nan)
        if np.nanmin(line) < 0.5 < np.nanmax(line):
            axes.contour(*mesh, line, levels=[0.5], colors=[colours[expert % 4]], linewidths=1.8)
    for vowel, (sign, marker) in {"iy": ("i", "o"), "ih": ("ɪ", "^"), "aa": ("ɑ", "o"), "ah": ("ʌ", "^")}.items():
        x_TD = speech.x_TD[speech.vowel_T == vowel]
        is_filled = marker == "o"
        face = palette.INK if is_filled else "none"
        axes.scatter(
            x_TD[:, 0], x_TD[:, 1], s=7, marker=marker, facecolor=face, edgecolor=palette.INK, linewidth=0.5, alpha=0.6
        )
        across_mean, up_mean = x_TD.mean(axis=0).tolist()
        box = {"facecolor": palette.PAPER, "edgecolor": "none", "alpha": 0.8, "boxstyle": "round,pad=0.15"}
        axes.text(across_mean, up_mean, f"[{sign}]", ha="center", va="center", fontsize=10, color=palette.INK, bbox=box)
    axes.set_xlabel("first formant, kHz")
    axes.set_ylabel("second formant, kHz")


def _bounds(speech: Speech) -> tuple[list[float], list[float]]:
    return speech.x_TD.min(axis=0).tolist(), speech.x_TD.max(axis=0).tolist()


def _short(name: str) -> str:
    return name.replace("network, ", "net, ").replace(" weights at first", " start").replace(" error", "")


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
