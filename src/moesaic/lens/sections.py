"""The parts of the page, as HTML; every piece of text from data is escaped here."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

import numpy as np

from moesaic.lens import downloads
from moesaic.lens.drawing import Picture
from moesaic.lens.measures import PreferredToken, preferred_tokens
from moesaic.lens.passages import Passage, passage_html
from moesaic.lens.study import Study
from moesaic.lens.tables import Table
from moesaic.lens.tokens import one_line

# What keeps the page of a large model at a few megabytes.
_MOST_EXPERTS = 64
_MOST_ROWS = 300


def section(name: str, heading: str, *parts: str) -> str:
    """A part of the page with a heading that the list of contents can lead to; empty where no part has anything."""
    body = "\n".join(filter(None, parts))
    if not body:
        return ""
    head = f'<h2 id="{name}-h">{escape(heading)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-h">\n{head}\n{body}\n</section>'


def sentences(plain: Iterable[str]) -> str:
    """Paragraphs; a number keeps its per cent sign on its line."""
    return "\n".join(f"<p>{escape(text).replace(' %', '&nbsp;%')}</p>" for text in plain)


def contents(sections: list[tuple[str, str, str]]) -> str:
    """The list of contents of (name, heading, html) sections; those without html are left out."""
    items = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, html in sections if html)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def pictures(shown: list[Picture], folder: str) -> str:
    """Figures with titles above, notes below, and their numbers and files at hand."""
    if not shown:
        return ""
    return '<div class="pictures">\n' + "\n".join(_figure(picture, folder) for picture in shown) + "\n</div>"


def table(shown: Table, folder: str, note: str = "") -> str:
    """A table that the script lets a reader sort and filter, and its CSV."""
    title = escape(shown.title)
    return (
        f'<div class="table">\n{f"<p>{escape(note)}</p>" if note else ""}\n{_scroll(shown)}\n'
        f"{downloads.links([downloads.of_table(shown)], title, folder)}\n</div>"
    )


def favourites(study: Study) -> str:
    """One table for each layer: the tokens that each expert prefers."""
    if not (study.trace.token_id >= 0).any():
        return ""
    tables = [_favourites_table(study, layer, is_open=layer == study.shown[0]) for layer in study.shown]
    top_k = study.trace.metadata.top_k
    every_time = ""
    if top_k is not None:
        share = f"{100 / max(1, top_k):.3g} %"
        every_time = f" With {top_k} choices for each token, {share} means that the expert takes it every time."
    return (
        "<p>Under each token: the share of its n choices that went to this expert. "
        "␣ is a space, ⏎ a new line, \\xNN a byte that is no character by itself."
        f'{every_time} {study.some_layers}</p>\n<div class="layers">\n' + "\n".join(tables) + "\n</div>"
    )


def reading(study: Study, passages: list[Passage]) -> str:
    """A passage of each domain, coloured for one layer; the script adds a choice of layers and of experts."""
    if not passages:
        return ""
    _, shown = passage_layers(study, passages)
    label = study.labels[shown]
    num_experts = max(study.trace.metadata.num_experts)
    legend = "".join(
        f'<span><i class="swatch" style="background: var(--e{expert})"></i>expert {expert}</span>'
        for expert in range(num_experts)
    )
    texts = "\n".join(
        f"<div><h3>{escape(one_line(passage.domain))}</h3>\n{passage_html(passage, shown, label)}</div>"
        for passage in passages
    )
    return (
        "<p>The beginning of the longest traced text of each domain. Every token has the colour of its first-choice "
        f'expert in <span class="layer">{escape(label)}</span>.</p>\n'
        '<div class="tools picker" role="group" aria-label="layer"></div>\n'
        + (
            f'<div class="legend" role="group" aria-label="expert">{legend}</div>\n'
            if num_experts <= _MOST_EXPERTS
            else ""
        )
        + f'<output class="reading" aria-live="polite"></output>\n<div class="passages">\n{texts}\n</div>'
    )


def passage_layers(study: Study, passages: list[Passage]) -> tuple[list[int], int]:
    """The layers that every passage can be coloured for, and the one shown at first: the last."""
    layers = [layer for layer in study.shown if all(layer in passage.choices for passage in passages)]
    return layers, layers[-1]


def _figure(picture: Picture, folder: str) -> str:
    numbers = ""
    if picture.numbers and len(picture.numbers.rows) <= _MOST_ROWS:
        numbers = f"<details><summary>The numbers</summary>\n{_scroll(picture.numbers)}\n</details>"
    return (
        f'<figure id="{picture.name}">\n<figcaption><h3>{escape(picture.title)}</h3></figcaption>\n{picture.svg}\n'
        f'<p class="note">{escape(picture.note)}</p>\n'
        f"{downloads.links(downloads.of_picture(picture), picture.title, folder)}\n{numbers}\n</figure>"
    )


def _scroll(shown: Table) -> str:
    """The table in a frame of its own: it may be wider than a phone, the page may not."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(shown.title)}">\n{shown.html()}\n</div>'


def _favourites_table(study: Study, layer: int, *, is_open: bool) -> str:
    share_E = study.load.value[layer]
    num_experts = study.trace.metadata.num_experts[layer]
    preferred = preferred_tokens(study.trace, layer, limit=8 if num_experts <= 16 else 5)
    experts = list(range(num_experts))
    note = ""
    if num_experts > _MOST_EXPERTS:
        experts = sorted(np.argsort(-share_E[:num_experts], kind="stable")[:_MOST_EXPERTS].tolist())
        note = f"<small>the {_MOST_EXPERTS} busiest of {num_experts} experts</small>"
    rows = "\n".join(
        f'<tr><th scope="row"><i class="swatch" style="background: var(--e{expert})"></i>expert {expert}</th>'
        f'<td class="taken">{100 * share_E[expert]:.1f} %</td>'
        f"<td>{_chips(preferred[expert])}</td></tr>"
        for expert in experts
    )
    label = escape(study.labels[layer])
    return (
        f"<details{' open' if is_open else ''}><summary>{label}{note}</summary>\n"
        f'<table class="stacked">\n<caption class="unseen">Tokens that the experts of {label} prefer</caption>\n'
        '<thead><tr><th scope="col">expert</th><th scope="col">its load</th><th scope="col">tokens it prefers, the '
        f"surest first</th></tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></details>"
    )


def _chips(tokens: list[PreferredToken]) -> str:
    if not tokens:
        return "<small>none beyond a 95 % interval</small>"
    chips = "".join(
        f'<span class="token" title="{token.lift:.1f} times its share of all choices"><code>{escape(token.text)}</code>'
        f"<small>{100 * token.share:.0f} %</small><small>n {token.num_rows:,}</small></span>"
        for token in tokens
    )
    return f'<div class="tokens">{chips}</div>'
