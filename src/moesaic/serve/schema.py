"""Requests as OpenAI's clients send them, and what of them is served."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from moesaic.core.errors import ConfigError
from moesaic.hf import SwitchOff, intervene
from moesaic.serve.events import Ask
from moesaic.serve.model import ServedModel
from moesaic.serve.refusal import BAD, UNKNOWN, RefusedError
from moesaic.serve.settings import Settings

_MAX_STOPS = 4
_MAX_STOP_CHARACTERS = 256
_COMPLETION_TOKENS = 16
"""What OpenAI's service writes where ``max_tokens`` is not given."""


class StreamOptions(BaseModel):
    """What a stream says beside the text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class _Sampled(BaseModel):
    # Fields that are not known are refused, so that nobody believes them to be in force.
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: StrictInt | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: StrictInt | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Served in the one way that changes nothing.
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class CompletionRequest(_Sampled):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[StrictInt]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | bool | None = None
    suffix: str | None = None


class TextPart(BaseModel):
    """One part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As a chat template reads it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(_Sampled):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None


class Off(BaseModel):
    """An expert to be switched off."""

    model_config = ConfigDict(extra="forbid")
    layer: StrictInt = Field(ge=0)
    expert: StrictInt = Field(ge=0)


class LiveRequest(BaseModel):
    """``POST /api/generate``, as the page sends it."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    chat: StrictBool = False
    max_tokens: StrictInt | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    seed: StrictInt = Field(default=0, ge=-(2**63), lt=2**63)
    switched_off: list[Off] = Field(default=[], max_length=256)


def completion_ask(body: CompletionRequest, served: ServedModel, settings: Settings) -> Ask:
    """What a completion request asks of the model.

    Raises:
        RefusedError: if it asks for what is not served.
    """
    _check_served(body, served, neutral={"best_of": 1, "echo": False, "logprobs": False, "suffix": ""})
    return _ask(body, _prompt(body.prompt, served), body.max_tokens or _COMPLETION_TOKENS, served, settings)


def chat_ask(body: ChatRequest, served: ServedModel, settings: Settings) -> Ask:
    """What a chat request asks of the model; without a limit, an answer may be as long as the service writes.

    Raises:
        RefusedError: if it asks for what is not served, or the model has no chat template.
    """
    neutral = {"logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none"}
    _check_served(body, served, neutral={**neutral, "response_format": {"type": "text"}})
    prompt = served.encode_chat([message.plain for message in body.messages])
    wanted = body.max_completion_tokens or body.max_tokens
    return _ask(body, prompt, wanted or longest_answer(prompt, served, settings), served, settings)


def live_ask(body: LiveRequest, served: ServedModel, settings: Settings) -> Ask:
    """What the page asks of the model.

    Raises:
        RefusedError: if it does not fit, or an expert cannot be switched off.
    """
    prompt = served.encode_chat([{"role": "user", "content": body.prompt}]) if body.chat else served.encode(body.prompt)
    max_tokens = body.max_tokens or longest_answer(prompt, served, settings)
    _check_lengths(prompt, max_tokens, served, settings)
    off: dict[int, list[int]] = {}
    for one in body.switched_off:
        off.setdefault(one.layer, []).append(one.expert)
    interventions = [SwitchOff(layer=layer, expert=tuple(dict.fromkeys(experts))) for layer, experts in off.items()]
    try:
        with intervene(served.model, *interventions):
            pass
    except ConfigError as error:
        raise RefusedError(BAD, str(error), field="switched_off") from error
    return Ask(
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        interventions=interventions,
        wants_routing=True,
    )


def longest_answer(prompt: Sequence[int], served: ServedModel, settings: Settings) -> int:
    """New tokens that an answer to a prompt may have, one at the least."""
    return max(1, min(settings.max_tokens, context_of(served, settings) - len(prompt)))


def context_of(served: ServedModel, settings: Settings) -> int:
    """Tokens that prompt and answer may have together."""
    return min(settings.max_context, served.context or settings.max_context)


def _prompt(given: str | list[str] | list[int], served: ServedModel) -> list[int]:
    if isinstance(given, str):
        return served.encode(given)
    if not given:
        raise RefusedError(BAD, "prompt is an empty list. Send a text, or its tokens.", field="prompt")
    if isinstance(given[0], str):
        if len(given) > 1:
            raise RefusedError(
                BAD,
                f"prompt must be one text, got {len(given)}: this service writes one answer for each request. Send "
                "them one by one.",
                field="prompt",
            )
        return served.encode(given[0])
    tokens = [int(token) for token in given]
    size = int(served.model.get_input_embeddings().num_embeddings)
    wrong = next((token for token in tokens if not 0 <= token < size), None)
    if wrong is not None:
        raise RefusedError(
            BAD, f"prompt has the token {wrong}, but this model's tokens are 0 to {size - 1}.", field="prompt"
        )
    return tokens


def _ask(body: _Sampled, prompt: list[int], max_tokens: int, served: ServedModel, settings: Settings) -> Ask:
    _check_lengths(prompt, max_tokens, served, settings)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > _MAX_STOPS or any(not 0 < len(stop) <= _MAX_STOP_CHARACTERS for stop in stops):
        raise RefusedError(
            BAD,
            f"stop must be at most {_MAX_STOPS} strings of 1 to {_MAX_STOP_CHARACTERS} characters, got {len(stops)} of "
            f"{sorted(map(len, stops))} characters.",
            field="stop",
        )
    return Ask(
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        stops=stops,
    )


def _check_lengths(prompt: Sequence[int], max_tokens: int, served: ServedModel, settings: Settings) -> None:
    if max_tokens > settings.max_tokens:
        raise RefusedError(
            BAD,
            f"max_tokens must be at most {settings.max_tokens} here, got {max_tokens}. Ask for fewer.",
            field="max_tokens",
        )
    context = context_of(served, settings)
    if len(prompt) + max_tokens > context:
        left = context - len(prompt)
        what = f"lower max_tokens to {left}" if left > 0 else f"shorten the prompt by {1 - left} tokens or more"
        raise RefusedError(
            BAD,
            f"Prompt and answer may have {context} tokens together, got {len(prompt)} of the prompt and max_tokens "
            f"{max_tokens}. Please {what}.",
            field="max_tokens" if left > 0 else "prompt",
            code="context_length_exceeded",
        )


def _check_served(body: _Sampled, served: ServedModel, *, neutral: dict[str, Any]) -> None:
    """Refuse what would be silently ignored, and requests for another model."""
    if body.model is not None and body.model != served.name:
        raise RefusedError(
            UNKNOWN,
            f"There is no model {body.model!r} here. This service has {served.name!r}.",
            field="model",
            code="model_not_found",
        )
    neutral = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, **neutral}
    for field, only in neutral.items():
        given = getattr(body, field)
        if given is not None and given != only:
            raise RefusedError(
                BAD,
                f"{field} is not served here, got {given!r}. Leave it out, or send {only!r}.",
                field=field,
                code="unsupported",
            )
    if body.stream_options is not None and not body.stream:
        raise RefusedError(BAD, "stream_options is for streams alone. Send stream as true too.", field="stream_options")
