"""Files that a reader may keep: beside the page, and inside it, so that it can travel alone."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import quote

from moesaic.lens.drawing import Picture
from moesaic.lens.tables import Table

# Browsers cut longer addresses off: such a file is linked beside the page instead.
_MOST_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """One file: its name, its media type and what is in it."""

    name: str
    media: str
    content: bytes


def of_table(table: Table) -> Download:
    """A table as CSV."""
    return Download(name=f"{table.name}.csv", media="text/csv", content=table.csv())


def of_picture(picture: Picture) -> list[Download]:
    """A picture as PNG and SVG, and its numbers as CSV."""
    files = [
        Download(name=f"{picture.name}.png", media="image/png", content=picture.png),
        Download(name=f"{picture.name}.svg", media="image/svg+xml", content=picture.drawing),
    ]
    return [*files, of_table(picture.numbers)] if picture.numbers else files


def links(files: Sequence[Download], what: str, folder: str) -> str:
    """A line of links that save each file.

    Args:
        files: what to save.
        what: of what they are, for those who hear the links one by one.
        folder: where the files lie beside the page.
    """
    parts = []
    for file in files:
        inside = f"data:{file.media};base64,{b64encode(file.content).decode()}"
        address = inside if len(inside) <= _MOST_BYTES else quote(f"{folder}/{file.name}")
        kind = file.name.rpartition(".")[2].upper()
        parts.append(
            f'<a download="{escape(file.name)}" href="{address}" aria-label="{kind} of {escape(what)}">{kind}</a>'
        )
    return f'<p class="files">Save as {" ".join(parts)}</p>'
