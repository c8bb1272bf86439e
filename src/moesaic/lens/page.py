"""The report: one HTML file that needs nothing else, and its figures and tables as files beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from moesaic.core.errors import DataError
from moesaic.core.files import cannot_write, replacing_file
from moesaic.lens import downloads, measures, palette, sections
from moesaic.lens.comparison import Comparison, compare, comparison_sentences, comparison_table
from moesaic.lens.figures.domains import domain_table
from moesaic.lens.figures.drawn import Figures, figures
from moesaic.lens.film import FILM, film_data
from moesaic.lens.headline import headline_numbers
from moesaic.lens.passages import Passage, passages
from moesaic.lens.runs import Run, read_run
from moesaic.lens.study import Study, study
from moesaic.lens.tables import Table
from moesaic.lens.token_tables import preferred_experts
from moesaic.lens.tokens import one_line
from moesaic.lens.verdict import verdict
from moesaic.telemetry.trace import RoutingTrace


def report(
    trace: RoutingTrace,
    out: str | Path,
    *,
    runs: Mapping[str, str | Path] | None = None,
    compare: RoutingTrace | None = None,
    title: str = "What the experts do",
) -> Path:
    """Write a page that says what each expert took, how evenly, and how the models learned.

    Args:
        trace: the choices to look at, best of held-out text.
        out: the page's path, or a folder, which gets ``report.html``. Beside it ``report-figures/``,
            named after the page, gets each figure as PNG and SVG and each table as CSV.
        runs: run folders by label; their histories give the curves over training. Made for a MoE and its dense twin,
            but any number will do.
        compare: another trace to put beside it, such as of a later checkpoint or of another model; choices are
            compared one by one where both have read the same text.
        title: heading of the page.
    Returns:
        The page's path.
    Raises:
        DataError: if a trace has no rows, or a run folder has no readable history.
        BackendError: if matplotlib is not installed.
        CheckpointError: if a file cannot be written.
    """
    for one in (trace, compare):
        if one is not None and one.num_rows == 0:
            raise DataError(
                "A report needs a trace with rows, and this one has none. Run at least one batch of text through the "
                "model while recording."
            )
    histories = [read_run(label, folder) for label, folder in (runs or {}).items()]
    first = study(trace)
    pair = _compared(first, compare)
    drawn = figures(first, histories, pair)
    tables = _tables(first, pair)
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        out = out / "report.html"
    folder = out.with_name(f"{out.stem}-figures")
    page = _page(first, pair, histories, drawn, tables, title, folder.name)
    for picture in drawn.all():
        for file in downloads.of_picture(picture):
            _write(folder / file.name, file.content)
    for table in tables.values():
        _write(folder / f"{table.name}.csv", table.csv())
    _write(out, page.encode())
    return out


def _compared(first: Study, other: RoutingTrace | None) -> Comparison | None:
    return None if other is None else compare(first, study(other))


def _tables(first: Study, pair: Comparison | None) -> dict[str, Table]:
    found = [comparison_table(pair) if pair else None, domain_table(first), preferred_experts(first)]
    return {table.name: table for table in found if table is not None and table.rows}


def _page(
    first: Study,
    pair: Comparison | None,
    runs: list[Run],
    drawn: Figures,
    tables: dict[str, Table],
    title: str,
    folder: str,
) -> str:
    most = max(first.trace.metadata.num_experts)
    read = passages(first.trace)
    script = _asset("page.js")
    parts = _parts(first, pair, runs, drawn, tables, read, folder)
    return Template(_asset("page.html")).substitute(
        title=escape(one_line(title)),
        kicker=escape(_kicker(first)),
        light=palette.css_variables(most, dark=False),
        dark=palette.css_variables(most, dark=True),
        css=_asset("page.css"),
        expert_css="\n".join(
            f".e{number} {{ --own: var(--e{number}); background: color-mix(in srgb, var(--own) 42%, transparent); }}"
            for number in range(most)
        ),
        verdict=sections.sentences(verdict(first, runs)),
        numbers=headline_numbers(first, runs),
        contents=sections.contents(parts),
        sections="\n".join(html for _, _, html in parts if html),
        method=_method(first, folder),
        script_hash=f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
        data=_data(first, read, film_data(runs)),
        script=f"<script>{script}</script>",
    )


def _parts(
    first: Study,
    pair: Comparison | None,
    runs: list[Run],
    drawn: Figures,
    tables: dict[str, Table],
    read: list[Passage],
    folder: str,
) -> list[tuple[str, str, str]]:
    """(name, heading, html) of each section, in the order of the page."""

    def table(name: str, note: str) -> str:
        return sections.table(tables[name], folder, note) if name in tables else ""

    film = FILM if film_data(runs) else ""
    shown = {
        "compared": ("Side by side", [_comparison(pair, tables, folder), sections.pictures(drawn.compared, folder)]),
        "learning": ("How well they predict", [sections.pictures(drawn.learning, folder)]),
        "subjects": ("Who takes what", [sections.pictures(drawn.domains, folder), table("domain_leans", _LEANS)]),
        "work": ("How the work is spread", [sections.pictures(drawn.load, folder)]),
        "relations": ("What goes with what", [sections.pictures(drawn.relations, folder)]),
        "read": ("Read along with the experts", [sections.reading(first, read)]),
        "words": ("Tokens that each expert prefers", [sections.favourites(first)]),
        "lookup": ("Look a token up", [table("tokens", _TOKENS)]),
        "settling": ("How the routers settled", [film, sections.pictures(drawn.settling, folder)]),
    }
    return [(name, heading, sections.section(name, heading, *body)) for name, (heading, body) in shown.items()]


_LEANS = (
    "For each domain and layer: the expert whose share of this domain is furthest above its share of an average one. "
    "Chance: the two shares are equal, and the ratio is 1; the busiest expert over the idlest is 1 too."
)
_TOKENS = (
    "The commonest tokens: the expert that is most often their first choice, how often, with the 95 % interval of that "
    "share, and what chance would give: that expert's share of all first choices."
)


def _comparison(pair: Comparison | None, tables: dict[str, Table], folder: str) -> str:
    if pair is None:
        return ""
    said = sections.sentences(comparison_sentences(pair))
    why_not = f"Single choices are not compared: {pair.why_not}" if pair.same is None else ""
    return f'<div class="verdict">\n{said}\n</div>\n{sections.table(tables["comparison"], folder, why_not)}'


def _kicker(first: Study) -> str:
    metadata = first.trace.metadata
    counts = sorted(set(metadata.num_experts))
    experts = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    layers = first.trace.num_layers
    parts = [
        one_line(metadata.model),
        one_line(metadata.recipe),
        f"{layers} MoE layer{'s' if layers > 1 else ''} of {experts} experts, {_choices(first.trace)}",
        f"{first.num_tokens:,} tokens traced",
    ]
    return " · ".join(filter(None, parts))


def _choices(trace: RoutingTrace) -> str:
    top_k = trace.metadata.top_k
    if top_k is None:
        return f"{np.nanmean(measures.experts_per_token(trace).value):.3g} for a token on average"
    return "all for every token" if top_k > 1 and {top_k} == set(trace.metadata.num_experts) else f"top {top_k}"


def _method(first: Study, folder: str) -> str:
    trace = first.trace
    place = trace.sequence.astype(np.int64) << 32 | trace.position.astype(np.int64)
    order = [*np.unique(trace.domain[trace.domain >= 0]), -1]
    counts = [
        f"{name} {len(np.unique(place[trace.domain == index])):,}"
        for name, index in zip(first.domains, order, strict=False)
    ]
    paragraphs = (
        f"Everything about routing comes from the routers' own choices on {first.num_tokens:,} tokens in "
        f"{len(np.unique(trace.sequence)):,} pieces of text ({', '.join(counts)}), {trace.num_rows:,} choices in all. "
        "Padding is left out; every choice of a token counts, not only its first, unless a figure says so; choices "
        "that were dropped for lack of room count as choices; experts that got nothing count in every mean.",
        "A token's lift for an expert is the share of that token's choices that went to the expert, over the expert's "
        "share of all choices. Tokens with fewer than 30 choices in a layer are left out and the rest ranked by the "
        "lower end of a 95 % interval, so that a rare token needs a stronger preference than a common one. Each "
        "interval stands alone: among hundreds of tokens a few pass by luck.",
        "Chance for domains is measured, not assumed: whole pieces of text exchange their domain labels 1,999 times, "
        "and the routing is scored again each time. Chance for tokens is measured by holding the choices against "
        "another part of the text.",
        f"Every figure is in {one_line(folder)}/ as PNG and SVG, every table as CSV with all digits; text that "
        "a spreadsheet would take for a formula has an apostrophe in front.",
    )
    return sections.sentences(paragraphs)


def _data(first: Study, read: list[Passage], film: list[dict[str, Any]]) -> str:
    """What the script works with, as JSON in which no ``<`` can end the element."""
    data: dict[str, Any] = {"film": film, "reading": None}
    if read:
        layers, shown = sections.passage_layers(first, read)
        data["reading"] = {
            "layers": [first.labels[layer] for layer in layers],
            "shown": layers.index(shown),
            "passages": [[_choices_of(passage, layer) for layer in layers] for passage in read],
        }
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="page-data">{text}</script>'


def _choices_of(passage: Passage, layer: int) -> list[list[list[float]]]:
    return [[[expert, round(weight, 3)] for expert, weight in token] for token in passage.choices.get(layer, [])]


def _asset(name: str) -> str:
    return (files("moesaic.lens") / name).read_text(encoding="utf-8")


def _write(path: Path, content: bytes) -> None:
    try:
        with replacing_file(path) as file:
            file.write(content)
    except OSError as error:
        raise cannot_write("report", path, error) from error
