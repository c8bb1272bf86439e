"""One picture for both studies: who takes how much more or less than chance, in cells of colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesaic.lens import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTOR = 4.0
"""Shares from a fourth of chance to four times it have a colour of their own."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Panel:
    """One grid of cells.

    Attributes:
        title: over it.
        rows: names of the rows.
        times: each cell's share over what chance gives, rows by experts.
    """

    title: str
    rows: Sequence[str]
    times: npt.NDArray[np.float64]


def paint(figure: Figure, panels: Sequence[Panel], columns: int) -> None:
    """Draw panels side by side, ``columns`` to a line, under one scale.

    Args:
        figure: an empty one.
        panels: in reading order; the first of each line has its rows named.
        columns: panels of a line.
    """
    from matplotlib.colors import LinearSegmentedColormap

    lines = -(-len(panels) // columns)
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    colours = LinearSegmentedColormap.from_list("times", [palette.LESS, palette.PAPER, palette.MORE])
    drawn: Any = None
    for place, panel in enumerate(panels):
        ax = axes[place // columns][place % columns]
        shown = np.log2(np.clip(panel.times, 1 / FACTOR, FACTOR))
        span = np.log2(FACTOR)
        drawn = ax.imshow(shown, cmap=colours, vmin=-span, vmax=span, aspect="auto", interpolation="nearest")
        ax.set_title(panel.title)
        ax.set_xticks(range(0, panel.times.shape[1], max(1, panel.times.shape[1] // 8)))
        ax.set_yticks(range(len(panel.rows)), panel.rows if place % columns == 0 else [""] * len(panel.rows))
        ax.tick_params(labelsize=6.5 if len(panel.rows) > 12 else 8)
        if place // columns == lines - 1:
            ax.set_xlabel("expert")
    for place in range(len(panels), lines * columns):
        axes[place // columns][place % columns].set_axis_off()
    bar: Any = figure.colorbar(drawn, ax=axes, shrink=0.5, aspect=30, location="bottom")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["a fourth", "half", "chance", "twice", "four times"])
    bar.outline.set_visible(False)
