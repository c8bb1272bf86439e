"""Tokens and names as a reader sees them, those too that cannot be seen."""

from __future__ import annotations

import unicodedata

from moesaic.telemetry.trace import RoutingTrace

_SYMBOLS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
# Format, control, unassigned, private and separators other than the plain space: they draw nothing, or turn text round.
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs")


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


def brief(text: str, most: int = 26) -> str:
    """A name that fits beside a drawing: of a longer one, its beginning and its end."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


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
