"""What is asked of a model, and what comes back, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.serve.refusal import RefusedError

Choice = tuple[int, float, bool]
"""One expert of a token in one layer: its number, its weight, and False where it was full and dropped the token."""

Routed = tuple[tuple[Choice, ...], ...]
"""The choices of one token, best first, layer by layer in depth order; none where it passed a layer by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a model is asked for.

    Attributes:
        prompt: tokens to go on from.
        max_tokens: new tokens, at most.
        temperature: 0 always takes the likeliest token.
        top_p: draw from the likeliest tokens of this mass.
        seed: of what is drawn.
        stops: strings that end the answer; they are not part of it.
        interventions: of :func:`moesaic.hf.intervene`, in force while this is answered and for nobody else.
        wants_routing: give each token's experts with it. A token is given when it has been read, one turn later.
    """

    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stops: Sequence[str] = ()
    interventions: Sequence[Any] = ()
    wants_routing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A token that a model has read, and the experts that it went to.

    Attributes:
        token_id: the token.
        text: the text that is certain with it; empty for the first bytes of a character.
        routed: its experts, by layer.
    """

    token_id: int
    text: str
    routed: Routed


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRead:
    """The prompt has been read; only where routing was wanted."""

    tokens: Sequence[Token]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The answer goes on.

    Attributes:
        text: what is new of it.
        token: the token and its experts, where routing was wanted.
    """

    text: str
    token: Token | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The answer is complete.

    Attributes:
        reason: ``stop``: the model ended it, or a stop string came; ``length``: it has ``max_tokens``.
        prompt_tokens: read.
        completion_tokens: written, the one that ended the answer included.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The answer broke off, and why."""

    refusal: RefusedError


Event = PromptRead | Piece | Finished | Failed
