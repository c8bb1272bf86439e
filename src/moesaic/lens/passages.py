"""A passage of each domain with every token in the colour of the expert that took it first, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from moesaic.lens.measures import domains
from moesaic.lens.tokens import one_line, token_text, visible
from moesaic.telemetry.trace import RoutingTrace

Choices = list[tuple[int, float]]
"""The experts of one token in one layer with their weights, best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """Some neighbouring tokens of one domain.

    Attributes:
        domain: its name.
        texts: what a reader sees of each token; empty for one that continues a character begun before it.
        choices: for each layer that read these tokens, for each token, its experts.
    """

    domain: str
    texts: list[str]
    choices: dict[int, list[Choices]]


def passages(trace: RoutingTrace, *, max_tokens: int = 360) -> list[Passage]:
    """The beginning of one text of each domain: the longest one's, and the earliest of equals; nothing is hand-picked.

    Empty where the trace does not know what its tokens say.
    """
    if not trace.metadata.token_text:
        return []
    last = trace.where(trace.layer == trace.layer.max())
    found = []
    order = [index for index in np.unique(trace.domain) if index >= 0] + [-1] * bool((trace.domain == -1).any())
    for index, name in zip(order, domains(trace), strict=True):
        inside = last.where(last.domain == index)
        if not inside.num_rows:
            continue
        sequences, counts = np.unique(inside.sequence, return_counts=True)
        text = trace.where((trace.domain == index) & (trace.sequence == sequences[np.argmax(counts)]))
        token_of = _tokens_read(text, max_tokens)
        tokens = list(token_of.values())
        if min(tokens) >= 0:
            found.append(Passage(domain=name, texts=_readable(trace, tokens), choices=_choices(text, token_of)))
    return found


def passage_html(passage: Passage, layer: int, label: str) -> str:
    """The passage as spans, coloured for one layer; every text escaped."""
    spans = [
        f'<span class="e{choices[0][0]}" title="{escape(describe(label, choices))}">{escape(text)}</span>'
        if choices
        else f'<span title="{escape(label)}: no expert">{escape(text)}</span>'
        for text, choices in zip(passage.texts, passage.choices[layer], strict=True)
    ]
    return f'<p class="passage" role="group" aria-label="{escape(one_line(passage.domain))}">{"".join(spans)}</p>'


def describe(label: str, choices: Choices) -> str:
    """One token's choices in words: ``layer 2: expert 5 (weight 0.71), expert 0 (weight 0.29)``."""
    return f"{label}: " + ", ".join(f"expert {expert} (weight {weight:.2f})" for expert, weight in choices)


def _tokens_read(text: RoutingTrace, max_tokens: int) -> dict[int, int]:
    """The first tokens by position, as the last layer read them and those before it that read the same."""
    token_of: dict[int, int] = {}
    for layer in np.unique(text.layer)[::-1]:
        own = _token_by_position(text, layer)
        if not _differ(own, token_of):
            token_of |= own
    return dict(sorted(token_of.items())[:max_tokens])


def _choices(text: RoutingTrace, token_of: dict[int, int]) -> dict[int, list[Choices]]:
    """Each layer's choices by position; layers that read other tokens there, an encoder's, are left out."""
    result: dict[int, list[Choices]] = {}
    for layer in np.unique(text.layer):
        if _differ(_token_by_position(text, layer), token_of):
            continue
        rows = text.where((text.layer == layer) & np.isin(text.position, list(token_of)))
        by_position: dict[int, Choices] = {position: [] for position in token_of}
        for row in np.lexsort((rows.choice, rows.position)):
            by_position[int(rows.position[row])].append((int(rows.expert[row]), float(rows.weight[row])))
        result[int(layer)] = list(by_position.values())
    return result


def _token_by_position(text: RoutingTrace, layer: int) -> dict[int, int]:
    rows = text.layer == layer
    return dict(zip(text.position[rows].tolist(), text.token_id[rows].tolist(), strict=True))


def _differ(one: dict[int, int], other: dict[int, int]) -> bool:
    """Whether the two have another token at any position that both know."""
    return any(other.get(position, token) != token for position, token in one.items())


def _readable(trace: RoutingTrace, tokens: list[int]) -> list[str]:
    """Tokens as running text: spaces as they are, lines broken where they break, split characters put together."""
    known = trace.metadata.token_text
    raw = [known[token] if token < len(known) else "" for token in tokens]
    result = [
        "⏎\n".join(map(one_line, text.split("\n"))) if text else token_text(trace, token)
        for text, token in zip(raw, tokens, strict=True)
    ]
    start = 0
    while start < len(raw):
        # A character of several bytes may be spread over up to four tokens.
        for end in range(start + 2, min(start + 4, len(raw)) + 1):
            if not all(map(_only_bytes, raw[start:end])):
                break
            text = _decoded("".join(raw[start:end]))
            if text is not None:
                result[start:end] = [visible(text), *[""] * (end - start - 1)]
                start = end - 1
                break
        start += 1
    return result


def _only_bytes(text: str) -> bool:
    return bool(text) and all("\udc80" <= character <= "\udcff" for character in text)


def _decoded(text: str) -> str | None:
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError:
        return None
