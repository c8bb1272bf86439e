"""Heat maps of ratios: orange for more than chance, blue for less, the paper's own colour for exactly chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesaic.lens import palette
from moesaic.lens.measures.measured import FloatArray
from moesaic.lens.tokens import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond these a cell has no room for its number.
_MOST_NUMBERED = 10
# Beyond these a picture in the drawing is smaller than a path for each cell.
_MOST_PATHS = 600


def colour_limit(ratio: FloatArray) -> float:
    """Distance in powers of two that gets full colour: the 98th percentile, but 1.5 times at least and 4 at most.

    The floor keeps noise pale.
    """
    known = ratio[~np.isnan(ratio) & (ratio > 0)]
    farthest = float(np.percentile(np.abs(np.log2(known)), 98)) if len(known) else 1.0
    return min(2.0, max(float(np.log2(1.5)), farthest))


def heat_map(
    panel: Axes, ratio: FloatArray, limit: float, *, columns: int = 1, texts: FloatArray | None = None
) -> None:
    """Colour a matrix of ratios to chance.

    Args:
        panel: where to.
        ratio: rows downwards, experts across; NaN where unknown.
        limit: see ``colour_limit``.
        columns: panels side by side: the narrower, the fewer cells have room for a number.
        texts: what is written into the cells, where there is room: whole numbers.
    """
    num_rows, num_experts = ratio.shape
    tint = _tints(ratio, limit)
    if ratio.size > _MOST_PATHS:
        panel.imshow(tint, extent=(0, num_experts, num_rows, 0), aspect="auto", interpolation="none")
    else:
        edges = np.arange(num_experts + 1), np.arange(num_rows + 1)
        panel.pcolormesh(*edges, tint, edgecolors=palette.PAPER, linewidth=1.2 if num_experts <= 32 else 0.4)
    panel.set_ylim(num_rows, 0)
    ticks = expert_ticks(num_experts, columns)
    panel.set_xticks(np.asarray(ticks) + 0.5, list(map(str, ticks)))
    for side in panel.spines.values():
        side.set_visible(False)
    if texts is None or num_experts > _MOST_NUMBERED / columns:
        return
    for row, column in np.argwhere(~np.isnan(texts)):
        panel.text(column + 0.5, row + 0.52, f"{texts[row, column]:.0f}", ha="center", va="center", fontsize=8)


def name_rows(panel: Axes, names: list[str], columns: int = 1) -> None:
    """Write the rows' names at the left; where they are many, only as many as there is room for."""
    step = -(-len(names) // 24) if len(names) > 60 else 1
    panel.set_yticks(np.arange(0, len(names), step) + 0.5, [brief(name, 26 // columns) for name in names[::step]])
    panel.tick_params(axis="y", labelcolor=palette.INK)


def ratio_key(figure: Figure, axes: list[Axes], limit: float, chance: str) -> None:
    """Say below the panels which colour means how many times ``chance``."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    steps = np.linspace(-limit, limit, 13)
    colours = ListedColormap(_tints(2**steps, limit))
    # The colours in between lie half a step further out than the outermost ticks.
    mappable = ScalarMappable(Normalize(-limit * 14 / 13, limit * 14 / 13), colours)
    key = figure.colorbar(mappable, ax=axes, location="bottom", shrink=0.6, aspect=45, pad=0.03)
    key.outline.set_visible(False)
    ticks = [power for power in (-2, -1, -0.585, 0, 0.585, 1, 2) if abs(power) <= limit + 0.01]
    if limit > 1.2:
        ticks = [power for power in ticks if power != 0.585 and power != -0.585]
    names = {-2: "¼", -1: "½", -0.585: "⅔", 0: chance, 0.585: "1.5×", 1: "2×", 2: "4×"}
    key.set_ticks(ticks, labels=[names[power] for power in ticks])


def expert_ticks(num_experts: int, columns: int = 1) -> list[int]:
    """The experts whose numbers are written below a panel."""
    step = 1
    while num_experts / step > 16 / columns:
        step *= 2
    return list(range(0, num_experts, step))


def _tints(ratio: FloatArray, limit: float) -> FloatArray:
    """Orange above 1, blue below, the more opaque the further away in log ratio; nothing at 1 and where unknown."""
    from matplotlib.colors import to_rgb

    with np.errstate(divide="ignore"):
        distance = np.nan_to_num(np.log2(ratio), nan=0.0, neginf=-limit)
    tint = np.empty((*ratio.shape, 4))
    tint[..., :3] = np.where(distance[..., None] > 0, to_rgb(palette.MORE), to_rgb(palette.LESS))
    tint[..., 3] = np.minimum(1, np.abs(distance) / limit) * 0.95
    return tint
