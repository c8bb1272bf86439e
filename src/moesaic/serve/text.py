"""Tokens become text as they come, and stop where the client said."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text as they come; bytes of an unfinished character wait for the rest.

    What all calls give together is what decoding all tokens at once would give. Only a window is decoded each time:
    the piece of text before the newest one, since a first token may lose its blank, and the newest one.

    Args:
        decode: gives the text of some tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._newest = 0
        self._given = 0

    def put(self, token: int) -> str:
        """Take a token; give the text that is certain by now and was not given before."""
        self._window.append(token)
        text = self._decode(self._window)
        # The last replacement mark may be the first bytes of a character; those before it stay what they are.
        certain = text.removesuffix(_UNFINISHED)
        new = self._take(certain)
        if new and certain == text:
            self._window = self._window[self._newest :]
            self._newest = len(self._window)
            self._given = len(self._decode(self._window))
        return new

    def end(self) -> str:
        """Give what is left, as it is."""
        return self._take(self._decode(self._window))

    def _take(self, certain: str) -> str:
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        return new


class StopText:
    """Cuts a text before the first of some strings, though it comes in pieces.

    Args:
        stops: the strings; text that could begin one is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def put(self, text: str) -> tuple[str, bool]:
        """Take a piece; give what may be shown, and whether the text ends there."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((_begun(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown, False

    def end(self) -> str:
        """Give what was held back in vain."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the first ones of a string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
