"""The parts of the page, as HTML; every piece of text from data is escaped here."""

from __future__ import annotations

from html import escape

import numpy as np

from moesaic.lens import metrics
from moesaic.lens.drawing import Picture
from moesaic.lens.layers import labels_of, shown_layers
from moesaic.lens.passages import Passage, passage_html
from moesaic.lens.tokens import PreferredToken, one_line, preferred_tokens
from moesaic.telemetry.trace import RoutingTrace

# What keeps the page of a large model at a few megabytes.
_MOST_EXPERTS = 64


def picture_section(heading: str, pictures: list[Picture]) -> str:
    """Figures with titles above and notes below."""
    if not pictures:
        return ""
    parts = [
        f"<figure>\n<figcaption><h3>{escape(picture.title)}</h3></figcaption>\n{picture.svg}\n"
        f'<p class="note">{escape(picture.note)}</p>\n</figure>'
        for picture in pictures
    ]
    body = "\n".join(parts)
    return f'<section>\n<h2>{escape(heading)}</h2>\n<div class="pictures">\n{body}\n</div>\n</section>'


def favourites_section(trace: RoutingTrace) -> str:
    """One table for each layer: the tokens that each expert prefers."""
    if not (trace.token_id >= 0).any():
        return ""
    labels = labels_of(trace)
    layers = shown_layers(trace)
    tables = [_favourites_table(trace, layer, labels[layer], is_open=layer == layers[0]) for layer in layers]
    top_k = trace.metadata.top_k
    every_time = ""
    if top_k is not None:
        share = f"{100 / max(1, top_k):.3g} %"
        every_time = f" With {top_k} choices for each token, {share} means that the expert takes it every time."
    some = "" if len(layers) == trace.num_layers else f" {len(layers)} of {trace.num_layers} layers are shown."
    return (
        "<section>\n<h2>Tokens that each expert prefers</h2>\n"
        "<p>Under each token: the share of its n choices that went to this expert. "
        f"␣ is a space, ⏎ a new line, \\xNN a byte that is no character by itself."
        f'{every_time}{some}</p>\n<div class="layers">\n' + "\n".join(tables) + "\n</div>\n</section>"
    )


def passages_section(trace: RoutingTrace, passages: list[Passage]) -> str:
    """A passage of each domain, coloured for one layer; the script adds a choice of layers."""
    if not passages:
        return ""
    layers, labels, shown = passage_layers(trace, passages)
    label = labels[layers.index(shown)]
    num_experts = max(trace.metadata.num_experts)
    legend = "".join(
        f'<span><i class="swatch" style="background: var(--e{expert})"></i>expert {expert}</span>'
        for expert in range(num_experts)
    )
    texts = "\n".join(
        f"<div><h3>{escape(one_line(passage.domain))}</h3>\n{passage_html(passage, shown, label)}</div>"
        for passage in passages
    )
    return (
        "<section>\n<h2>Read along with the experts</h2>\n"
        "<p>The beginning of the longest traced text of each domain. Every token has the colour of its first-choice "
        f"expert in {escape(label)}.</p>\n"
        f'<div class="picker" role="group" aria-label="layer"></div>\n'
        + (f'<div class="legend">{legend}</div>\n' if num_experts <= _MOST_EXPERTS else "")
        + f'<output class="reading"></output>\n<div class="passages">\n{texts}\n</div>\n</section>'
    )


def passage_layers(trace: RoutingTrace, passages: list[Passage]) -> tuple[list[int], list[str], int]:
    """The layers that every passage can be coloured for, their labels, and the one shown at first: the last."""
    layers = [layer for layer in shown_layers(trace) if all(layer in passage.choices for passage in passages)]
    labels = labels_of(trace)
    return layers, [labels[layer] for layer in layers], layers[-1]


def _favourites_table(trace: RoutingTrace, layer: int, label: str, *, is_open: bool) -> str:
    share_E = metrics.load_share(trace)[layer]
    num_experts = trace.metadata.num_experts[layer]
    limit = 8 if num_experts <= 16 else 5
    preferred = preferred_tokens(trace, layer, limit=limit)
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
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(label)}{note}</summary>\n<table>\n"
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
