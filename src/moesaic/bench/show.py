"""A group as a table, for a terminal or a page."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.bench.result import Group, Line
from moesaic.bench.timing import spread


def columns(group: Group) -> tuple[str, ...]:
    """Headings."""
    to_limit = f"of {group.limit}" if group.limit else ""
    return ("", group.unit, "lowest to highest", to_limit, "goal", "")


def rows(group: Group) -> list[tuple[str, ...]]:
    """Cells of each line."""
    return [_row(line) for line in group.lines]


def _row(line: Line) -> tuple[str, ...]:
    if not line.samples:
        return (line.name, "–", "", "", "", line.note)
    low, middle, high = spread(line.samples)
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    return (
        line.name,
        number(middle),
        f"{number(low)} to {number(high)}" if len(line.samples) > 1 else "",
        ratio,
        "; ".join(map(str, line.goals)),
        line.note,
    )


def number(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def is_right(column: int) -> bool:
    """Whether a column holds numbers."""
    return column in (1, 2, 3)


def markdown(group: Group, *, heading: Sequence[str] | None = None) -> list[str]:
    """Lines of a Markdown table; a column that is empty throughout is left out."""
    head, body = list(heading or columns(group)), rows(group)
    kept = [at for at in range(len(head)) if at == 0 or any(row[at] for row in body)]
    out = ["| " + " | ".join(head[at] for at in kept) + " |"]
    out.append("|" + "|".join("---:" if is_right(at) else "---" for at in kept) + "|")
    out += ["| " + " | ".join(row[at].replace("|", "\\|") for at in kept) + " |" for row in body]
    return out
