"""What stands before every route: who may ask, under which name, in which form, how much."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.serve.meter import Meter
from moesaic.serve.refusal import FOREIGN, MISDIRECTED, NO_KEY, NOT_JSON, SLOW, TOO_LARGE, RefusedError
from moesaic.serve.settings import Settings

_OPEN = ("/", "/page.css", "/page.js", "/healthz")
"""Paths that need no key: the page, which asks for it, and whether the service is up."""
_BODY_S = 30.0

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses requests before any route sees them, and counts what was answered.

    Args:
        app: what stands behind.
        settings: who may ask, and how much.
        meter: counts answers by path and status.
    """

    def __init__(self, app: ASGIApp, settings: Settings, meter: Meter) -> None:
        self._app, self._settings, self._meter = app, settings, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                self._meter.answered(scope["path"], message["status"])
            await send(message)

        try:
            self._check(scope["path"], scope["method"], Headers(scope=scope))
            body = await self._body(Headers(scope=scope), receive)
        except RefusedError as refusal:
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, counted)
            return
        await self._app(scope, _replayed(body, receive), counted)

    def _check(self, path: str, method: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._settings.may_be_called(_name_of(host)):
            raise RefusedError(
                MISDIRECTED,
                f"This service does not go by the name {_name_of(host)!r}. Use its address, or start it with "
                "--allow-host and that name.",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RefusedError(
                FOREIGN,
                f"Pages of {origin} may not use this service from a browser. Ask from a program.",
                code="origin",
            )
        if path not in _OPEN:
            self._check_key(headers.get("authorization", ""))
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # Other forms can be sent by any page without asking first.
        if method == "POST" and kind != "application/json":
            raise RefusedError(
                NOT_JSON, f"Send JSON with Content-Type: application/json, got {kind or 'no content type'}."
            )

    def _check_key(self, authorization: str) -> None:
        key = self._settings.api_key
        if key is None:
            return
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            what = "another one" if given else "none"
            raise RefusedError(
                NO_KEY,
                f"This service needs its API key as Authorization: Bearer, got {what}. Send the key that it was "
                "started with.",
                code="invalid_api_key",
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, as long as it is short and comes soon: routes need no limits of their own."""
        limit = self._settings.max_body_bytes
        too_large = RefusedError(
            TOO_LARGE, f"A request may have {limit:,} bytes here. Send a shorter one.", code="request_too_large"
        )
        told = headers.get("content-length", "0")
        if told.isdigit() and int(told) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_S):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise RefusedError(SLOW, f"The request did not come within {_BODY_S:.0f} seconds. Send it again.") from None


def known_paths(paths: Iterable[str]) -> frozenset[str]:
    """The paths that are counted by name: all that have no variable part."""
    return frozenset(path for path in paths if "{" not in path)


def _name_of(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What has been read, then what comes after it: that the client leaves."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
