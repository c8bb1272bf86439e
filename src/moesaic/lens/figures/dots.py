"""Rows of dots: a value for each layer, with a grey tick where chance would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moesaic.lens import palette
from moesaic.lens.measures.measured import FloatArray
from moesaic.lens.tokens import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def dots(panel: Axes, values: Sequence[float], chances: Sequence[float], texts: Sequence[str]) -> None:
    """Draw one row for each value in per cent, the first on top; rows without a value stay empty."""
    for row, (value, chance, text) in enumerate(zip(values, chances, texts, strict=True)):
        if not np.isfinite(value):
            continue
        panel.plot([0, value], [row, row], color=palette.LINE, linewidth=2, zorder=1)
        panel.plot(chance, row, "|", color=palette.MUTED, markersize=11, mew=2, zorder=2)
        panel.plot(value, row, "o", color=palette.SPARSE, markersize=6, zorder=3)
        # Right of both marks, or the number would lie on the tick.
        panel.annotate(
            text,
            (float(np.nanmax([value, chance])), row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    panel.set_xlim(0, max(10.0, 1.45 * max((value for value in values if np.isfinite(value)), default=0.0)))
    panel.xaxis.set_major_formatter("{x:.0f} %")
    panel.spines["left"].set_visible(False)


def pair_of_dots(panel: Axes, values: tuple[FloatArray, FloatArray], colours: tuple[str, str]) -> None:
    """Draw two models' values, each over its own relative depth: a line with a dot at every layer."""
    for number, (line, colour) in enumerate(zip(values, colours, strict=True)):
        depth = np.linspace(0, 1, len(line)) if len(line) > 1 else np.array([0.5])
        panel.plot(depth, line, "os"[number] + "-", color=colour, markersize=4.5)
    panel.set_xlim(-0.04, 1.04)
    panel.set_xticks([0, 0.5, 1], ["first layer", "middle", "last layer"])
    panel.grid(axis="y")
    panel.spines["left"].set_visible(False)


def label_rows(panel: Axes, names: Sequence[str]) -> None:
    """Name the rows of dots."""
    panel.set_yticks(range(len(names)), [brief(name) for name in names])
    panel.tick_params(axis="y", labelcolor=palette.INK)
    panel.set_ylim(len(names) - 0.5, -0.7)
