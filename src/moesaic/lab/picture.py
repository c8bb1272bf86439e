"""The gallery at a glance: a row for each recipe, its score beside its balance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moesaic import recipes
from moesaic.core.errors import BackendError
from moesaic.lab.gallery import Gallery
from moesaic.lab.small import TWIN, Kind, Outcome
from moesaic.lens import palette
from moesaic.lens.drawing import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES, ROW_INCHES, HEAD_INCHES, FOOT_INCHES = 7.2, 0.185, 0.42, 0.5
GAP_INCHES = HEAD_INCHES + FOOT_INCHES - 0.12


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One group of rows.

    Attributes:
        title: over it.
        unit: of the score.
        rows: what each row is called, and its runs.
        lines: dense models, drawn as lines across all rows: what each is called, and its runs.
        percent: whether the score is a share.
    """

    title: str
    unit: str
    rows: Sequence[tuple[str, Sequence[Outcome]]]
    lines: Sequence[tuple[str, Sequence[Outcome]]]
    percent: bool = False

    @property
    def height_inches(self) -> float:
        """Of its rows."""
        return ROW_INCHES * len(self.rows)

    def scores(self, runs: Sequence[Outcome]) -> list[float]:
        """Of each run, in the panel's unit."""
        return [one.score * (100 if self.percent else 1) for one in runs]


def needs_picture() -> None:
    """See that a picture can be drawn.

    Raises:
        BackendError: naming the extra that brings what is missing.
    """
    if find_spec("matplotlib") is None:
        raise BackendError(
            "The gallery's picture needs matplotlib, which is not there. Install it with: pip install 'moesaic[lab]'"
        )


def picture(result: Gallery) -> str:
    """Draw the gallery as SVG, on paper of its own so that it reads on a dark page too.

    Raises:
        BackendError: without matplotlib.
    """
    needs_picture()
    import matplotlib

    # Readers without the font see their own.
    style = {**STYLE, "font.family": ["DejaVu Sans", "sans-serif"], "svg.hashsalt": "gallery"}
    with matplotlib.rc_context(style):
        figure = paint(result)
        svg = StringIO()
        figure.savefig(svg, format="svg", facecolor=palette.PAPER, metadata={"Date": None})
    return svg.getvalue()


def paint(result: Gallery) -> Figure:
    """Draw the gallery into a new figure, in the style that matplotlib is set to."""
    from matplotlib.figure import Figure

    panels = [panel for panel in _panels(result) if panel.rows]
    height = sum(panel.height_inches for panel in panels) + GAP_INCHES * max(1, len(panels)) + 0.3
    figure = Figure(figsize=(WIDTH_INCHES, height))
    top = height - HEAD_INCHES
    for panel in panels:
        bottom = top - panel.height_inches
        place = (bottom / height, panel.height_inches / height)
        score = figure.add_axes((0.245, place[0], 0.455, place[1]))
        load = figure.add_axes((0.745, place[0], 0.23, place[1]))
        _paint_scores(score, panel)
        _paint_loads(load, panel)
        top = bottom - GAP_INCHES
    legend = "large dots: mean over seeds; small dots: seeds; grey: the dense model of equal active parameters"
    figure.text(0.02, 0.05 / height, legend, fontsize=6.8, color=palette.MUTED)
    return figure


def _panels(result: Gallery) -> list[Panel]:
    steps = result.setup.steps
    twin = result.of("text", TWIN)
    dense, trained_on = ("dense twin", twin), ("dense, trained on", result.of("adapted", TWIN))
    bits = "bits per byte, lower is better"
    return [
        Panel(title="From scratch, on text", unit=bits, rows=_rows(result, "text"), lines=[dense]),
        Panel(
            title="From a trained dense model",
            unit=bits,
            rows=_rows(result, "adapted"),
            lines=[(f"dense, {steps} steps", twin), trained_on],
        ),
        Panel(
            title="On images",
            unit="% of held-out images right",
            rows=_rows(result, "images"),
            lines=[("dense twin", result.of("images", TWIN))],
            percent=True,
        ),
    ]


def _rows(result: Gallery, kind: Kind) -> list[tuple[str, Sequence[Outcome]]]:
    return [(name, result.of(kind, name)) for name in result.names(kind)]


def _paint_scores(axes: Axes, panel: Panel) -> None:
    dense = sorted(((panel.scores(runs), name) for name, runs in panel.lines if runs), key=lambda one: fmean(one[0]))
    for index, (scores, name) in enumerate(dense):
        axes.axvspan(min(scores), max(scores), color=palette.DENSE, alpha=0.2, linewidth=0)
        axes.axvline(fmean(scores), color=palette.DENSE, linewidth=1.2)
        axes.annotate(
            name,
            (fmean(scores), 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            # Names of neighbours lie on the outer sides of their lines.
            ha="center" if len(dense) == 1 else ("right", "left")[index],
            color=palette.MUTED,
            fontsize=7,
        )
    for row, (_, runs) in enumerate(panel.rows):
        scores = panel.scores(runs)
        axes.plot([min(scores), max(scores)], [row, row], color=palette.SPARSE, linewidth=1.4, alpha=0.45)
        axes.plot(scores, [row] * len(scores), "o", color=palette.SPARSE, markersize=2.6, alpha=0.5, markeredgewidth=0)
        axes.plot(fmean(scores), row, "o", color=palette.SPARSE, markersize=5, markeredgewidth=0)
    _dress(axes, panel.unit, len(panel.rows))
    axes.set_yticks(range(len(panel.rows)), [name for name, _ in panel.rows])
    axes.tick_params(axis="y", labelcolor=palette.INK, pad=26)
    axes.annotate(
        panel.title,
        (0, 1),
        xycoords="axes fraction",
        xytext=(-118, 14),
        textcoords="offset points",
        fontsize=9.5,
        fontweight="bold",
    )
    previous = None
    for row, (name, _) in enumerate(panel.rows):
        year = recipes.get(name).year
        if year != previous:
            _beside(axes, row, str(year))
        previous = year


def _beside(axes: Axes, row: int, text: str) -> None:
    axes.annotate(
        text,
        (0, row),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=6.8,
        color=palette.MUTED,
    )


def _paint_loads(axes: Axes, panel: Panel) -> None:
    for row, (_, runs) in enumerate(panel.rows):
        loads = [one.load_max_over_mean for one in runs]
        mean = fmean(loads)
        axes.plot([1, mean], [row, row], color=palette.MORE, linewidth=3.2, alpha=0.85, solid_capstyle="butt")
        axes.plot(loads, [row] * len(loads), "o", color=palette.MORE, markersize=2.6, markeredgewidth=0)
    axes.axvline(1, color=palette.DENSE, linewidth=1.1)
    _dress(axes, "busiest expert over mean, 1 is even", len(panel.rows))
    axes.set_yticks([])
    highest = max(max(one.load_max_over_mean for one in runs) for _, runs in panel.rows)
    axes.set_xlim(0.96, max(2.0, 1.03 * highest))
    axes.set_xticks(range(1, 1 + max(2, math.floor(highest))))


def _dress(axes: Axes, label: str, num_rows: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(num_rows - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=7.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", zorder=0)
    for row in range(1, num_rows, 2):
        axes.axhspan(row - 0.5, row + 0.5, color=palette.LINE, alpha=0.25, linewidth=0, zorder=0)
    sides: Any = axes.spines
    sides["left"].set_visible(False)
