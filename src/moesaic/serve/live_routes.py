"""The page, and what it asks: an answer with every token's experts, and what an expert likes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from fastapi import APIRouter, Response

from moesaic.lens import palette
from moesaic.lens.layers import layer_labels
from moesaic.serve.engine import Engine
from moesaic.serve.events import Failed, Finished, Piece, PromptRead, Token
from moesaic.serve.heard import Heard
from moesaic.serve.model import ServedModel
from moesaic.serve.refusal import UNKNOWN, RefusedError
from moesaic.serve.schema import LiveRequest, context_of, live_ask
from moesaic.serve.settings import Settings
from moesaic.serve.stream import EventStream, Mailbox, data_line


def live_routes(served: ServedModel, engine: Engine, heard: Heard, settings: Settings) -> APIRouter:
    """The page and the routes under ``/api``.

    Args:
        served: the model.
        engine: writes the answers.
        heard: knows what experts took.
        settings: limits.
    """
    router = APIRouter()
    labels = layer_labels(list(served.layers))
    page, style, script = _page(served), _style(served), _asset("moesaic.serve", "page.js")

    @router.get("/")
    async def show() -> Response:
        return Response(page, media_type="text/html; charset=utf-8")

    @router.get("/page.css")
    async def css() -> Response:
        return Response(style, media_type="text/css; charset=utf-8")

    @router.get("/page.js")
    async def javascript() -> Response:
        return Response(script, media_type="text/javascript; charset=utf-8")

    @router.get("/api/model")
    async def model() -> dict[str, Any]:
        return {
            "name": served.name,
            "recipe": served.recipe,
            "layers": [
                {"name": name, "label": labels[name], "num_experts": count} for name, count in served.layers.items()
            ],
            "has_chat_template": served.has_chat_template,
            "max_tokens": settings.max_tokens,
            "context": context_of(served, settings),
        }

    @router.post("/api/generate")
    async def generate(body: LiveRequest) -> Response:
        mailbox = Mailbox()
        job = engine.submit(live_ask(body, served, settings), mailbox.put)
        return EventStream(_lines(mailbox), job)

    # Not async: sorting tens of thousands of choices would hold up everybody's stream.
    @router.get("/api/experts/{layer}/{expert}")
    def expert(layer: int, expert: int) -> dict[str, Any]:
        return _about(served, heard, layer, expert)

    return router


def _about(served: ServedModel, heard: Heard, layer: int, expert: int) -> dict[str, Any]:
    counts = list(served.layers.values())
    if not 0 <= layer < len(counts) or not 0 <= expert < counts[layer]:
        have = f"layers 0 to {len(counts) - 1}" if not 0 <= layer < len(counts) else f"experts 0 to {counts[layer] - 1}"
        raise RefusedError(UNKNOWN, f"There is no expert {expert} in layer {layer}: this model has {have} there.")
    liked, num_choices = heard.favourites(layer, expert)
    load_E = heard.load(layer)
    return {
        "layer": layer,
        "expert": expert,
        "choices": int(load_E[expert]),
        "share": float(load_E[expert] / max(1, load_E.sum())),
        "even_share": 1 / counts[layer],
        "tokens_from_trace": heard.from_trace,
        "tokens_from_service": heard.from_service,
        "told_of": num_choices,
        "favourites": [
            {"text": one.text, "share": one.share, "lift": one.lift, "count": one.num_rows} for one in liked
        ],
    }


async def _lines(mailbox: Mailbox) -> AsyncIterator[str]:
    async for event in mailbox:
        if isinstance(event, PromptRead):
            yield data_line({"tokens": [_token(token) for token in event.tokens]}, event="prompt")
        elif isinstance(event, Piece) and event.token is not None:
            yield data_line(_token(event.token), event="token")
        elif isinstance(event, Piece):
            yield data_line({"text": event.text}, event="text")
        elif isinstance(event, Finished):
            usage = {"prompt_tokens": event.prompt_tokens, "completion_tokens": event.completion_tokens}
            yield data_line({"reason": event.reason, **usage}, event="done")
        elif isinstance(event, Failed):
            yield data_line(event.refusal.body, event="error")


def _token(token: Token) -> dict[str, Any]:
    """A token as the page reads it; an expert that was full is told by a third number, 0."""
    routed = [
        [[expert, round(weight, 4)] if kept else [expert, round(weight, 4), 0] for expert, weight, kept in choices]
        for choices in token.routed
    ]
    return {"id": token.token_id, "text": token.text, "experts": routed}


def _page(served: ServedModel) -> str:
    return Template(_asset("moesaic.serve", "page.html")).substitute(name=escape(served.name))


def _style(served: ServedModel) -> str:
    """The report's look, and the colours of as many experts as the widest layer has."""
    most = max(served.layers.values())
    light, dark = (palette.css_variables(most, dark=dark) for dark in (False, True))
    experts = "\n".join(
        f".e{number} {{ --own: var(--e{number}); background: color-mix(in srgb, var(--e{number}) 42%, transparent); }}"
        for number in range(most)
    )
    variables = f":root {{ color-scheme: light dark; {light} }}\n"
    variables += f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    return variables + _asset("moesaic.lens", "page.css") + experts + "\n" + _asset("moesaic.serve", "page.css")


def _asset(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")
