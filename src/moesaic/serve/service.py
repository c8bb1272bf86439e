"""A service from its start to its end: it listens, says where, and stops cleanly when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from moesaic.core.errors import BackendError
from moesaic.hf.recording import token_texts
from moesaic.serve.app import build_app
from moesaic.serve.engine import Engine
from moesaic.serve.heard import Heard
from moesaic.serve.model import ServedModel, load_served
from moesaic.serve.settings import Settings

_LAST_WORDS_S = 5


def serve(
    path: Path,
    settings: Settings | None = None,
    *,
    name: str | None = None,
    trace: Path | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a model until the process is told to stop (SIGINT or SIGTERM), then end the running answers and return.

    Args:
        path: a run folder, or a model folder.
        settings: where to listen, who may ask, how much.
        name: by which clients ask for the model; the folder's own by default.
        trace: a routing trace of the model; by default the one that ``moesaic inspect`` wrote into the run folder.
        ready: called with the service's address when it answers.
    Raises:
        CheckpointError: if the model cannot be read.
        ConfigError: if it cannot be served.
        BackendError: if the address is taken.
    """
    settings = settings or Settings()
    # An address that is taken is told before a model is loaded in vain.
    with _listen(settings) as listening:
        service = _Service(load_served(path, name=name, trace=trace), settings, listening)
        service.run(ready or (lambda _url: None), with_signals=True)


@contextmanager
def running(served: ServedModel, settings: Settings | None = None) -> Iterator[str]:
    """Serve a model in the background; gives the service's address, and stops it at the end of the block.

    Args:
        served: the model, see :func:`moesaic.serve.model`.
        settings: where to listen, who may ask, how much; port 0 takes a free one.
    Raises:
        BackendError: if the address is taken.
    """
    settings = settings or Settings(port=0)
    service, ready = _Service(served, settings, _listen(settings)), threading.Event()
    url: list[str] = []

    def note(address: str) -> None:
        url.append(address)
        ready.set()

    thread = threading.Thread(target=service.run, args=(note,), name="moesaic-http", daemon=True)
    thread.start()
    try:
        while not ready.wait(0.05):
            if not thread.is_alive():
                raise BackendError("The service ended before it could answer. See the log for why.")
        yield url[0]
    finally:
        service.stop()
        thread.join()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to us: uvicorn raises them again at its end, and the process would not end with 0."""
        yield


class _Service:
    def __init__(self, served: ServedModel, settings: Settings, listening: socket.socket) -> None:
        self._settings, self._socket = settings, listening
        self._heard = Heard(served.layers, token_texts(served.tokenizer))
        if served.trace is not None:
            self._heard.read_trace(served.trace)
        self._engine = Engine(served, self._heard, max_active=settings.max_active, max_waiting=settings.max_waiting)
        app = build_app(served, self._engine, self._heard, settings)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
            server_header=False,
            # Answers end by themselves before that.
            timeout_graceful_shutdown=round(settings.grace_s) + _LAST_WORDS_S,
        )
        self._server = _Server(config)

    def run(self, ready: Callable[[str], None], *, with_signals: bool = False) -> None:
        """Answer requests until :meth:`stop`."""
        self._engine.start()
        try:
            with self._signals() if with_signals else contextlib.nullcontext():
                asyncio.run(self._serve(ready))
        finally:
            self._engine.stop(0)
            self._engine.join()
            self._socket.close()

    def stop(self, grace_s: float | None = None) -> None:
        """Take no more requests, and let running answers go on for a while."""
        self._engine.stop(self._settings.grace_s if grace_s is None else grace_s)
        self._server.should_exit = True

    async def _serve(self, ready: Callable[[str], None]) -> None:
        task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not task.done():
            await asyncio.sleep(0.01)
        if self._server.started:
            ready(_url(self._socket))
        await task

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the service; a second one breaks off the answers that still run."""
        asked = False

        def handle(_number: int, _frame: FrameType | None) -> None:
            nonlocal asked
            self.stop(0 if asked else None)
            asked = True

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=256)
    except OSError as error:
        reason = error.strerror or error
        raise BackendError(
            f"moesaic serve cannot listen on {settings.host} port {settings.port}: {reason}. Name another with --port, "
            "or 0 for any that is free, and an address of this machine with --host."
        ) from error


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
