"""Tokens: which ones an expert prefers, and how to show one that cannot be seen."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np

from moesaic.lens.metrics import FloatArray
from moesaic.telemetry.trace import RoutingTrace

_SYMBOLS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
# Format, control, unassigned, private and separators other than the plain space: they draw nothing, or turn text round.
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferredToken:
    """A token that an expert takes more often than its other work would lead one to expect.

    Attributes:
        token_id: the token.
        text: what a reader sees of it, see ``visible``.
        share: the part of the token's choices in this layer that went to the expert.
        lift: ``share`` over the expert's share of all choices in this layer.
        num_rows: the token's choices in this layer.
    """

    token_id: int
    text: str
    share: float
    lift: float
    num_rows: int


def preferred_tokens(
    trace: RoutingTrace, layer: int, *, limit: int = 10, min_rows: int = 30
) -> list[list[PreferredToken]]:
    """For each expert of a layer, the tokens that it prefers, best first.

    A token's lift is ``(rows[t, e] / rows[t]) / (rows[e] / rows)``. Tokens with fewer than ``min_rows`` rows are left
    out, and the rest are ranked by the lift's lower bound, with the Wilson 95 % interval's lower end in the place of
    ``rows[t, e] / rows[t]``, so that a rare token must show a stronger preference than a common one. Only tokens whose
    lower bound is above 1 are preferred at all.
    """
    rows = (trace.layer == layer) & (trace.token_id >= 0)
    num_experts = trace.metadata.num_experts[layer]
    tokens, token = np.unique(trace.token_id[rows], return_inverse=True)
    count_VE = np.bincount(token * num_experts + trace.expert[rows], minlength=len(tokens) * num_experts)
    count_VE = count_VE.reshape(len(tokens), num_experts)
    rows_V = count_VE.sum(axis=1)
    base_E = count_VE.sum(axis=0) / max(1, count_VE.sum())
    share_VE = count_VE / np.maximum(1, rows_V)[:, None]
    bound_VE = _wilson_lower(share_VE, rows_V[:, None])
    result: list[list[PreferredToken]] = []
    for expert in range(num_experts):
        if base_E[expert] == 0:
            result.append([])
            continue
        bound_V = np.where(rows_V >= min_rows, bound_VE[:, expert] / base_E[expert], 0.0)
        best = [index for index in np.argsort(-bound_V, kind="stable")[:limit] if bound_V[index] > 1]
        result.append(
            [
                PreferredToken(
                    token_id=int(tokens[index]),
                    text=token_text(trace, int(tokens[index])),
                    share=float(share_VE[index, expert]),
                    lift=float(share_VE[index, expert] / base_E[expert]),
                    num_rows=int(rows_V[index]),
                )
                for index in best
            ]
        )
    return result


def token_text(trace: RoutingTrace, token_id: int) -> str:
    """A token as a reader sees it; its number where the trace does not know its text."""
    known = trace.metadata.token_text
    if not 0 <= token_id < len(known):
        return f"#{token_id}"
    return visible(known[token_id]) or f"#{token_id}"


def visible(text: str) -> str:
    r"""Text with nothing unseen in it: ``␣`` for a space, ``⏎`` for a new line, ``\xNN`` for a byte that is no text.

    Bytes are expected as lone surrogates, the way ``bytes.decode("utf-8", "surrogateescape")`` leaves them.
    """
    return "".join(map(_visible_character, text))


def one_line(text: str) -> str:
    """A name fit for a heading: spaces stay spaces, everything else unseen is made visible."""
    return " ".join(map(visible, text.split(" ")))


def _visible_character(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02X}"
    category = unicodedata.category(character)
    if category == "Cs" or category in _UNSEEN:
        return f"\\x{code:02X}" if code < 0x100 else f"\\u{{{code:X}}}"
    # A combining mark by itself would sit on its neighbour.
    return f"◌{character}" if category in ("Mn", "Me") else character


def _wilson_lower(share: FloatArray, count: FloatArray) -> FloatArray:
    """Lower end of the 95 % interval of a share (Wilson 1927)."""
    z = 1.96
    count = np.maximum(count, 1)
    centre = share + z**2 / (2 * count)
    spread = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.asarray((centre - spread) / (1 + z**2 / count), dtype=np.float64)
