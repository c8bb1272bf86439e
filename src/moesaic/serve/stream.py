"""From the thread that writes to the loop that sends, and what happens when nobody listens any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moesaic.serve.engine import Job
from moesaic.serve.events import Event, Failed, Finished
from moesaic.serve.refusal import GONE, RefusedError


class Mailbox:
    """Carries the events of one answer from the writing thread into the event loop in which it was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Called in the writing thread."""
        # The loop may be gone: the service was stopped the hard way.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self._queue.get()
            yield event
            if isinstance(event, Finished | Failed):
                return


class EventStream(StreamingResponse):
    """Server-sent events of one answer; when the client leaves, no more of it is written."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], job: Job) -> None:
        super().__init__(lines, headers={"X-Accel-Buffering": "no"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def until_done(request: Request, mailbox: Mailbox, job: Job) -> list[Event]:
    """All events of an answer; when the client leaves, no more of it is written.

    Args:
        request: whose body has been read.
        mailbox: of the answer.
        job: the answer.
    Raises:
        RefusedError: if the client has left; nobody reads it.
    """
    gather = asyncio.create_task(_all(mailbox))
    leave = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({gather, leave}, return_when=asyncio.FIRST_COMPLETED)
        if not gather.done():
            raise RefusedError(GONE, "The client left before the answer was complete.")
        return gather.result()
    finally:
        job.cancel()
        gather.cancel()
        leave.cancel()


def data_line(value: dict[str, Any], event: str | None = None) -> str:
    """One server-sent event; JSON has no line breaks of its own, which would end it."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(value, separators=(',', ':'))}\n\n"


async def _all(mailbox: Mailbox) -> list[Event]:
    return [event async for event in mailbox]


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
