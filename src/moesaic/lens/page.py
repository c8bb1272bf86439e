"""The report: one HTML file that needs nothing else, and its figures as PNG beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from moesaic.core.errors import DataError
from moesaic.core.files import cannot_write, replacing_file
from moesaic.lens import information, metrics, palette
from moesaic.lens.drawing import Picture
from moesaic.lens.figures import figures
from moesaic.lens.headline import headline_numbers
from moesaic.lens.passages import Passage, passages
from moesaic.lens.runs import Run, read_run
from moesaic.lens.sections import favourites_section, passage_layers, passages_section, picture_section
from moesaic.lens.tokens import one_line
from moesaic.lens.verdict import verdict
from moesaic.telemetry.trace import RoutingTrace

_LEARNING = ("loss", "by_domain")
_ROUTING = ("domains", "load", "information", "repetition")


def report(
    trace: RoutingTrace,
    out: str | Path,
    *,
    runs: Mapping[str, str | Path] | None = None,
    title: str = "What the experts do",
) -> Path:
    """Write a page that says what each expert took, how evenly, and how the models learned.

    Args:
        trace: the choices to look at, best of held-out text.
        out: the page's path, or a folder, which gets ``report.html``. Beside it ``report-figures/``,
            named after the page, gets each figure as PNG.
        runs: run folders by label; their histories give the curves over training. Made for a MoE and its dense twin,
            but any number will do.
        title: heading of the page.
    Returns:
        The page's path.
    Raises:
        DataError: if the trace has no rows, or a run folder has no readable history.
        BackendError: if matplotlib is not installed.
        CheckpointError: if a file cannot be written.
    """
    if trace.num_rows == 0:
        raise DataError(
            "A report needs a trace with rows, and this one has none. Run at least one batch of text through the "
            "model while recording."
        )
    histories = [read_run(label, folder) for label, folder in (runs or {}).items()]
    domain, token = information.about_domain(trace), information.about_token(trace)
    pictures = figures(trace, histories, domain, token)
    page = _page(trace, histories, pictures, title, verdict(trace, histories, domain))
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        out = out / "report.html"
    for picture in pictures:
        _write(out.with_name(f"{out.stem}-figures") / f"{picture.name}.png", picture.png)
    _write(out, page.encode())
    return out


def _page(trace: RoutingTrace, runs: list[Run], pictures: list[Picture], title: str, sentences: list[str]) -> str:
    most = max(trace.metadata.num_experts)
    read = passages(trace)
    script = _asset("page.js")
    by_name = {picture.name: picture for picture in pictures}
    learning = [picture for name, picture in by_name.items() if name in _LEARNING]
    routing = [picture for name, picture in by_name.items() if name in _ROUTING]
    rest = [picture for name, picture in by_name.items() if name not in _LEARNING + _ROUTING]
    sections = [
        picture_section("How well they predict", learning),
        picture_section("Who takes what", routing),
        picture_section("How the routers settled", rest),
        passages_section(trace, read),
        favourites_section(trace),
    ]
    return Template(_asset("page.html")).substitute(
        title=escape(one_line(title)),
        kicker=escape(_kicker(trace)),
        light=palette.css_variables(most, dark=False),
        dark=palette.css_variables(most, dark=True),
        css=_asset("page.css"),
        expert_css="\n".join(
            f".e{number} {{ background: color-mix(in srgb, var(--e{number}) 42%, transparent); }}"
            for number in range(most)
        ),
        verdict="\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences),
        numbers=headline_numbers(trace, runs),
        sections="\n".join(filter(None, sections)),
        method=_method(trace),
        script_hash=f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
        scripts=f"{_data(trace, read)}\n<script>{script}</script>" if read else "",
    )


def _kicker(trace: RoutingTrace) -> str:
    metadata = trace.metadata
    counts = sorted(set(metadata.num_experts))
    experts = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    parts = [
        one_line(metadata.model),
        one_line(metadata.recipe),
        f"{trace.num_layers} MoE layer{'s' if trace.num_layers > 1 else ''} of {experts} experts, {_choices(trace)}",
        f"{trace.num_tokens:,} tokens traced",
    ]
    return " · ".join(filter(None, parts))


def _choices(trace: RoutingTrace) -> str:
    top_k = trace.metadata.top_k
    if top_k is None:
        return f"{np.nanmean(metrics.experts_per_token(trace)):.3g} for a token on average"
    return "all for every token" if top_k > 1 and {top_k} == set(trace.metadata.num_experts) else f"top {top_k}"


def _method(trace: RoutingTrace) -> str:
    counts = []
    for name, index in zip(metrics.domains(trace), [*np.unique(trace.domain[trace.domain >= 0]), -1], strict=False):
        counts.append(f"{one_line(name)} {trace.where(trace.domain == index).num_tokens:,}")
    paragraphs = (
        f"Everything about routing comes from the routers' own choices on {trace.num_tokens:,} tokens in "
        f"{len(np.unique(trace.sequence)):,} pieces of text ({', '.join(counts)}), {trace.num_rows:,} choices in all. "
        "Padding is left out; every choice of a token counts, not only its first; choices that were dropped for "
        "lack of room count as choices; experts that got nothing count in every mean.",
        "A token's lift for an expert is the share of that token's choices that went to the expert, over the expert's "
        "share of all choices. Tokens with fewer than 30 choices in a layer are left out and the rest ranked by the "
        "lower end of a 95 % interval, so that a rare token needs a stronger preference than a common one. Each "
        "interval stands alone: among hundreds of tokens a few pass by luck.",
        "Chance for domains is measured, not assumed: whole pieces of text exchange their domain labels 1,999 times, "
        "and the routing is scored again each time.",
    )
    return "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)


def _data(trace: RoutingTrace, read: list[Passage]) -> str:
    """The passages' choices for the script, as JSON in which no ``<`` can end the element."""
    layers, labels, shown = passage_layers(trace, read)
    data = {
        "layers": labels,
        "shown": layers.index(shown),
        "passages": [
            [
                [[[expert, round(weight, 3)] for expert, weight in token] for token in passage.choices.get(layer, [])]
                for layer in layers
            ]
            for passage in read
        ],
    }
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="passage-data">{text}</script>'


def _asset(name: str) -> str:
    return (files("moesaic.lens") / name).read_text(encoding="utf-8")


def _write(path: Path, content: bytes) -> None:
    try:
        with replacing_file(path) as file:
            file.write(content)
    except OSError as error:
        raise cannot_write("report", path, error) from error
