"""From a matplotlib figure to what the page and its folder need: an SVG in themed colours, and SVG and PNG files."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

from moesaic.core.errors import BackendError
from moesaic.lens import palette
from moesaic.lens.tables import Table
from moesaic.lens.tokens import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 4.9
"""Narrow, so that nine-point letters are still nine points on a phone."""

STYLE: Any = {
    # Names come from data: a dollar sign in one is a dollar sign.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelsize": 8,
    "axes.labelcolor": palette.MUTED,
    "axes.edgecolor": palette.LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.xmargin": 0.015,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": palette.LINE,
    "grid.linewidth": 0.7,
    "text.color": palette.INK,
    "xtick.color": palette.LINE,
    "ytick.color": palette.LINE,
    "xtick.labelcolor": palette.MUTED,
    "ytick.labelcolor": palette.MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
"""Settings of matplotlib for every figure of the house."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One figure, ready for the page and for the folder.

    Attributes:
        name: stem of its files.
        title: what it shows, in words.
        note: how to read it, how much data it rests on and what chance would give.
        svg: the drawing without title and note, in CSS variables for colours.
        drawing: the same as a file of its own, on white.
        png: the same with title and note, on white.
        numbers: what is drawn, for those who cannot see it or want to work with it.
    """

    name: str
    title: str
    note: str
    svg: str
    drawing: bytes
    png: bytes
    numbers: Table | None = None


def draw(
    name: str,
    title: str,
    note: str,
    height_inches: float,
    paint: Callable[[Figure], None],
    *,
    num_experts: int = 0,
    numbers: Table | None = None,
) -> Picture:
    """Let ``paint`` fill an empty figure, and render it.

    Args:
        name: stem of its files; no other picture of a page may have it.
        title: what it shows, in words.
        note: how to read it, n, and what chance would give.
        height_inches: of the drawing; its width is ``WIDTH_INCHES``.
        paint: gets the empty figure.
        num_experts: experts whose colours are in it.
        numbers: what is drawn.
    Raises:
        BackendError: if matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError(
            "Figures need matplotlib, which is not installed. Try: pip install 'moesaic[report]'"
        ) from error
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # A name in a script that the font lacks draws boxes in the PNG; the page uses the reader's fonts.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        paint(figure)
        svg = StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        png = _png(figure, title, note)
    return Picture(
        name=name,
        title=title,
        note=note,
        svg=palette.with_variables(_element(svg.getvalue(), name, title), num_experts),
        drawing=_file(svg.getvalue(), title, note).encode(),
        png=png,
        numbers=numbers,
    )


def panels(figure: Figure, count: int, columns: int = 1, **options: Any) -> list[Axes]:
    """``count`` axes in rows of ``columns``, what is left of the last row being taken away."""
    rows = -(-count // columns)
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for extra in axes[count:]:
        extra.remove()
    return axes[:count]


def label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, (height, name, colour) each, moved apart so that no two names touch.

    Call it last: it needs the panel's final limits and size.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    height_points = axes.get_window_extent().height * 72 / figure.dpi
    ends = sorted(ends)
    heights = _apart([height for height, _, _ in ends], (high - low) * 10 / max(height_points, 1))
    for (_, name, colour), height in zip(ends, heights, strict=True):
        axes.annotate(
            brief(name),
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
        )


def _apart(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved as little as it takes for neighbours to lie ``gap`` apart."""
    blocks: list[tuple[float, int]] = []  # (middle, members)
    for height in heights:
        middle, members = height, 1
        while blocks and middle - (members - 1) * gap / 2 < blocks[-1][0] + (blocks[-1][1] + 1) * gap / 2:
            before, number = blocks.pop()
            middle, members = (middle * members + before * number) / (members + number), members + number
        blocks.append((middle, members))
    return [middle + (place - (members - 1) / 2) * gap for middle, members in blocks for place in range(members)]


def _png(figure: Figure, title: str, note: str) -> bytes:
    from PIL import Image

    heading = textwrap.fill(title, 50)
    foot = textwrap.fill(note, 92)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * len(heading.splitlines()) + 0.14 * len(foot.splitlines()) + 0.2)
    figure.set_facecolor("#ffffff")
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(foot, x=0.01, ha="left", fontsize=6.8, color=palette.MUTED)
    drawn, png = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=200, facecolor="#ffffff", metadata={"Software": None})
    # A drawing has few colours: with a palette of 256 it is a third of the size. Pillow comes with matplotlib.
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(png, format="png", optimize=True)
    return png.getvalue()


def _element(svg: str, name: str, title: str) -> str:
    """One ``<svg>`` element that may stand beside others: no prologue, no style sheet, no id that another has."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style type=\"text/css\">.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<= id=")|(?<=xlink:href="#)|(?<=url\(#)', f"{name}-", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    box = view_box[0] if view_box else ""
    opening = (
        f'<svg {box} role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + svg[svg.index(">") + 1 :]


def _file(svg: str, title: str, note: str) -> str:
    """The drawing by itself: on white, with title and note for readers of the file and of the screen."""
    start = svg.index(">", svg.index("<svg")) + 1
    told = f"<title>{escape(title)}</title><desc>{escape(note)}</desc>"
    return f'{svg[:start]}{told}<rect width="100%" height="100%" fill="#ffffff"/>{svg[start:]}'
