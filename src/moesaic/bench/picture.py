"""Results as drawings: bars beside the limit, and lines over growing sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING, Any

from moesaic.bench.result import Group, Line, Result
from moesaic.bench.show import number
from moesaic.core.errors import BackendError
from moesaic.lens import palette
from moesaic.lens.drawing import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES, ROW_INCHES, HEAD_INCHES, FOOT_INCHES = 7.6, 0.19, 0.42, 0.5
MAX_COLUMNS = 3


def needs_pictures() -> None:
    """See that pictures can be drawn.

    Raises:
        BackendError: naming the extra that brings what is missing.
    """
    if find_spec("matplotlib") is None:
        raise BackendError(
            "The pictures of a bench need matplotlib, which is not there. Install it with: pip install "
            "'moesaic[report]', or look at the tables alone."
        )


def picture(result: Result) -> str | None:
    """Draw a result as SVG, on paper of its own; None where nothing was measured that a drawing would make clearer.

    Raises:
        BackendError: without matplotlib.
    """
    needs_pictures()
    import matplotlib

    groups = panels(result)
    if not groups:
        return None
    style = {**STYLE, "font.family": ["DejaVu Sans", "sans-serif"], "svg.hashsalt": "bench"}
    with matplotlib.rc_context(style):
        figure = _lines(groups) if result.verb == "scale" else _bars(groups, *_BARS[result.verb])
        svg = StringIO()
        figure.savefig(svg, format="svg", facecolor=palette.PAPER, metadata={"Date": None})
    return svg.getvalue()


def panels(result: Result) -> list[Group]:
    """The groups of a result that are drawn."""
    chosen = [group for group in result.groups if _IS_DRAWN[result.verb](group)]
    return [group for group in chosen if any(line.samples for line in group.lines)]


Value = Callable[[Line], float | None]


def _bars(groups: Sequence[Group], value: Value, label: str) -> Figure:
    """A panel for each group, a bar for each line; the limit in grey and as a line across."""
    from matplotlib.figure import Figure

    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    tall = max(len(group.lines) for group in groups) * ROW_INCHES
    height = rows * (tall + HEAD_INCHES + FOOT_INCHES)
    figure = Figure(figsize=(WIDTH_INCHES, height))
    left, wide = 0.245, 0.735 / columns
    for at, group in enumerate(groups):
        row, column = divmod(at, columns)
        bottom = height - (row + 1) * (tall + HEAD_INCHES + FOOT_INCHES) + FOOT_INCHES
        place = (left + column * wide, bottom / height, wide - 0.05, tall / height)
        _paint_bars(figure.add_axes(place), group, value, label, named=column == 0)
    return figure


def _paint_bars(axes: Axes, group: Group, value: Callable[[Line], float | None], label: str, *, named: bool) -> None:
    values = [value(line) for line in group.lines]
    # One slow contender must not make all others look alike: its bar is cut off, its number says how long it is.
    ours = [found for line, found in zip(group.lines, values, strict=True) if found and _is_ours(line.name)]
    longest = max(found for found in values if found is not None)
    end = min(longest, 6 * min(ours, default=longest))
    # On paper of its own, before the line across.
    text: dict[str, Any] = {
        "xytext": (3, 0),
        "textcoords": "offset points",
        "va": "center",
        "fontsize": 6.8,
        "zorder": 3,
    }
    text["bbox"] = {"facecolor": palette.PAPER, "edgecolor": "none", "pad": 0.6}
    for row, (line, found) in enumerate(zip(group.lines, values, strict=True)):
        if found is None:
            axes.annotate("not measured", (0, row), **text)
            continue
        colour = palette.SPARSE if _is_ours(line.name) else palette.DENSE
        axes.barh(row, min(found, end), height=0.68, color=colour, linewidth=0)
        says = number(found) if found <= end else f"→ {number(found)}"
        axes.annotate(says, (min(found, end), row), **text)
    limit = group.line(group.limit)
    at = value(limit) if limit is not None else None
    if at is not None:
        axes.axvline(at, color=palette.MORE, linewidth=1.1)
    axes.set_xlim(0, end * 1.16)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_yticks(range(len(values)), [line.name for line in group.lines] if named else [""] * len(values))
    axes.tick_params(axis="y", labelcolor=palette.INK)
    axes.set_xlabel(label, fontsize=7)
    axes.set_title(group.title.replace(", balanced", ""), fontsize=7.8)
    sides: Any = axes.spines
    sides["left"].set_visible(False)


def _lines(groups: Sequence[Group]) -> Figure:
    """A panel for each group, a line for each contender."""
    from matplotlib.figure import Figure

    rows = -(-len(groups) // MAX_COLUMNS)
    figure = Figure(figsize=(WIDTH_INCHES, 2.5 * rows))
    # The legend where all contenders are.
    fullest = max(range(len(groups)), key=lambda at: (len(_contenders(groups[at])), -at))
    for at, group in enumerate(groups):
        axes = figure.add_subplot(rows, MAX_COLUMNS, at + 1)
        _paint_growth(axes, group, legend=at == fullest)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.9, bottom=0.12, wspace=0.24, hspace=0.5)
    return figure


def _paint_growth(axes: Axes, group: Group, *, legend: bool) -> None:
    """A line for each contender over the sizes, which its lines name after a comma."""
    by_name = _contenders(group)
    sizes = list(dict.fromkeys(size for found in by_name.values() for size, _ in found))
    colours = [palette.SPARSE, *palette.OTHERS]
    for name, found in by_name.items():
        colour = palette.DENSE if name == group.limit else colours.pop(0)
        places = [sizes.index(size) for size, _ in found]
        axes.plot(places, [value for _, value in found], "o-", color=colour, markersize=3, label=name)
    axes.set_xticks(range(len(sizes)), [size.removeprefix("T=").removeprefix("E=") for size in sizes], fontsize=6.5)
    axes.set_ylim(bottom=0)
    axes.set_title("\n".join(group.title.split(", ", 1)), fontsize=7.2)
    axes.set_ylabel(group.unit, fontsize=7)
    if legend:
        axes.legend(fontsize=6.5)


def _contenders(group: Group) -> dict[str, list[tuple[str, float]]]:
    """Size and value of each line, by contender."""
    found: dict[str, list[tuple[str, float]]] = {}
    for line in group.lines:
        name, _, size = line.name.partition(", ")
        if line.value is not None:
            found.setdefault(name, []).append((size, line.value))
    return found


def _is_ours(name: str) -> bool:
    return name.startswith("moesaic")


_BARS: dict[str, tuple[Value, str]] = {
    "layer": (lambda line: line.ratio, "time of a training step, of the dense layer's"),
    "decode": (lambda line: line.ratio, "time of one token, of the time to read its weights"),
    "memory": (lambda line: line.value, "MiB kept for the backward"),
    "model": (lambda line: line.value, "tokens per second, in training"),
}
_IS_DRAWN: dict[str, Callable[[Group], bool]] = {
    "layer": lambda group: (group.facts.get("kind"), group.facts.get("mode")) == ("times", "train"),
    "decode": lambda group: group.facts.get("T") == 1,
    "memory": lambda group: group.facts.get("mode") == "held_bytes",
    "model": lambda _group: True,
    "scale": lambda _group: True,
}
