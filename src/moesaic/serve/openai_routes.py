"""The part of OpenAI's interface that is served: completions and chat completions, streamed or whole, and the model."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from moesaic.serve.engine import Engine
from moesaic.serve.events import Ask, Failed, Finished, Piece
from moesaic.serve.model import ServedModel
from moesaic.serve.refusal import UNKNOWN, RefusedError
from moesaic.serve.schema import ChatRequest, CompletionRequest, chat_ask, completion_ask
from moesaic.serve.settings import Settings
from moesaic.serve.stream import EventStream, Mailbox, data_line, until_done


@dataclass(frozen=True, kw_only=True, slots=True)
class _Form:
    """How one of the two interfaces writes an answer.

    Attributes:
        head: what every object begins with.
        whole: the one choice of a whole answer, from its text and how it ended.
        opening: the first choice of a stream; None where the first piece opens it.
        piece: a choice of a stream, from a piece of text, or None at the end, and how it ended.
        kinds: names of the object, whole and as a chunk of a stream.
    """

    head: dict[str, Any]
    whole: Callable[[str, str], dict[str, Any]]
    opening: dict[str, Any] | None
    piece: Callable[[str | None, str | None], dict[str, Any]]
    kinds: tuple[str, str]


def openai_routes(served: ServedModel, engine: Engine, settings: Settings) -> APIRouter:
    """The routes under ``/v1``.

    Args:
        served: the model.
        engine: writes the answers.
        settings: limits.
    """
    router = APIRouter(prefix="/v1")
    card = {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "moesaic"}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != served.name:
            raise RefusedError(
                UNKNOWN, f"There is no model {name!r} here. This service has {served.name!r}.", code="model_not_found"
            )
        return card

    @router.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        ask, form = completion_ask(body, served, settings), _completion_form(served)
        return await _respond(request, engine, ask, form, body)

    @router.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        ask, form = chat_ask(body, served, settings), _chat_form(served)
        return await _respond(request, engine, ask, form, body)

    return router


async def _respond(
    request: Request, engine: Engine, ask: Ask, form: _Form, body: CompletionRequest | ChatRequest
) -> Response:
    mailbox = Mailbox()
    job = engine.submit(ask, mailbox.put)
    if body.stream:
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(mailbox, form, wants_usage=wants_usage), job)
    events = await until_done(request, mailbox, job)
    last = events[-1]
    if isinstance(last, Failed):
        raise last.refusal
    assert isinstance(last, Finished)
    text = "".join(event.text for event in events if isinstance(event, Piece))
    answer = {**form.head, "object": form.kinds[0], "choices": [form.whole(text, last.reason)], "usage": _usage(last)}
    return JSONResponse(answer)


async def _chunks(mailbox: Mailbox, form: _Form, *, wants_usage: bool) -> AsyncIterator[str]:
    head = {**form.head, "object": form.kinds[1]} | ({"usage": None} if wants_usage else {})
    if form.opening is not None:
        yield data_line({**head, "choices": [form.opening]})
    async for event in mailbox:
        if isinstance(event, Piece):
            yield data_line({**head, "choices": [form.piece(event.text, None)]})
        elif isinstance(event, Finished):
            yield data_line({**head, "choices": [form.piece(None, event.reason)]})
            if wants_usage:
                yield data_line({**head, "choices": [], "usage": _usage(event)})
            yield "data: [DONE]\n\n"
        elif isinstance(event, Failed):
            yield data_line(event.refusal.body)


def _completion_form(served: ServedModel) -> _Form:
    def choice(text: str | None, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": reason}

    return _Form(
        head=_head("cmpl", served),
        whole=choice,
        opening=None,
        piece=choice,
        kinds=("text_completion", "text_completion"),
    )


def _chat_form(served: ServedModel) -> _Form:
    def whole(text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    def piece(text: str | None, reason: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}

    return _Form(
        head=_head("chatcmpl", served),
        whole=whole,
        opening={**piece(None, None), "delta": {"role": "assistant", "content": ""}},
        piece=piece,
        kinds=("chat.completion", "chat.completion.chunk"),
    )


def _head(kind: str, served: ServedModel) -> dict[str, Any]:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.name}


def _usage(finished: Finished) -> dict[str, int]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }
