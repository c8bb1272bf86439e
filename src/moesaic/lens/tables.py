"""Tables: the numbers behind the pictures and those that a reader wants to search, as CSV and as HTML."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO

Cell = str | int | float | None
"""Text, a number, or None where there is none to give."""

# What a spreadsheet would take for a formula: text from a model must not start with it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        name: its heading, in the page and in the CSV.
        form: how a number is written in the page, as for ``format``; the CSV has all its digits.
        picks: whether the page offers its values as a choice, to see only the rows that have one of them.
    """

    name: str
    form: str = ""
    picks: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of text and numbers.

    Attributes:
        name: stem of its file.
        title: what it lists, in words.
        columns: one for each cell of a row.
        rows: the cells; text is plain, whoever writes it into a page escapes it.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def csv(self) -> bytes:
        """As a file: UTF-8, a heading line, numbers with all their digits, nothing where a number is unknown.

        Text that a spreadsheet would run as a formula gets an apostrophe in front.
        """
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([_guarded(column.name) for column in self.columns])
        writer.writerows([_guarded(cell) for cell in row] for row in self.rows)
        # A token may be half of a character: such a byte is written as it is shown.
        return text.getvalue().encode("utf-8", "backslashreplace")

    def html(self) -> str:
        """As a ``<table>`` with a caption; a number carries its value, for the script that sorts."""
        heads = "".join(
            f'<th scope="col"{_class(column)}{" data-picks" if column.picks else ""}>{escape(column.name)}</th>'
            for column in self.columns
        )
        rows = "\n".join(f"<tr>{self._cells(row)}</tr>" for row in self.rows)
        return (
            f"<table>\n<caption>{escape(self.title)}</caption>\n<thead><tr>{heads}</tr></thead>\n"
            f"<tbody>\n{rows}\n</tbody>\n</table>"
        )

    def _cells(self, row: Sequence[Cell]) -> str:
        parts = []
        for place, (cell, column) in enumerate(zip(row, self.columns, strict=True)):
            tag = 'th scope="row"' if place == 0 else "td"
            known = isinstance(cell, int | float) and math.isfinite(cell)
            value = f' data-v="{cell:.6g}"' if known else ""
            parts.append(f"<{tag}{_class(column)}{value}>{escape(_shown(cell, column))}</{tag[:2]}>")
        return "".join(parts)


def _class(column: Column) -> str:
    return ' class="n"' if column.form else ""


def _shown(cell: Cell, column: Column) -> str:
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "–"
    return cell if isinstance(cell, str) else format(cell, column.form)


def _guarded(cell: Cell) -> Cell:
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    if isinstance(cell, str) and cell.startswith(_FORMULA):
        return f"'{cell}"
    return cell
