"""All routes of a service together, and what becomes of errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from moesaic.serve.engine import Engine
from moesaic.serve.guard import Guard, known_paths
from moesaic.serve.heard import Heard
from moesaic.serve.live_routes import live_routes
from moesaic.serve.meter import MEDIA_TYPE, Meter, prometheus_text
from moesaic.serve.model import ServedModel
from moesaic.serve.openai_routes import openai_routes
from moesaic.serve.refusal import BAD, FAILED, RefusedError
from moesaic.serve.settings import Settings


def build_app(served: ServedModel, engine: Engine, heard: Heard, settings: Settings) -> FastAPI:
    """The service as an ASGI application.

    Args:
        served: the model.
        engine: writes the answers; it has been started.
        heard: gathers what experts took.
        settings: who may ask, and how much.
    """
    # FastAPI's own pages of documentation fetch their scripts from elsewhere.
    app = FastAPI(title="Moesaic", docs_url=None, redoc_url=None, openapi_url=None)
    routers = (openai_routes(served, engine, settings), live_routes(served, engine, heard, settings))
    for router in routers:
        app.include_router(router)

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": served.name, "active": engine.num_active, "waiting": engine.num_waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(prometheus_text(meter, engine, heard, served), media_type=MEDIA_TYPE)

    meter = Meter(known_paths(_paths(*routers, app)))
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _broken)
    app.add_middleware(Guard, settings=settings, meter=meter)
    return app


def _paths(*routers: APIRouter | FastAPI) -> Iterator[str]:
    for router in routers:
        yield from (route.path for route in router.routes if isinstance(route, APIRoute))


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse(error.body, error.status, error.headers)


async def _invalid(_request: Request, error: Exception) -> Response:
    """Say what is wrong with the first field that is."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [part for part in first["loc"] if part not in ("body", "path", "query")]
    field = next((str(part) for part in place if isinstance(part, str)), None)
    reason = first["msg"].rstrip(".")
    if first["type"] == "json_invalid":
        said = f"The body is not JSON: {first.get('ctx', {}).get('error', reason)}. Check its commas and quotes."
        return await _refused(_request, RefusedError(BAD, said))
    if first["type"] == "extra_forbidden":
        said = f"{'.'.join(map(str, place))} is not a field that is served here. Leave it out."
    elif first["type"] == "missing":
        said = f"{'.'.join(map(str, place)) or 'A JSON body'} is needed and was not given."
    else:
        said = f"{'.'.join(map(str, place)) or 'The body'}: {reason[:1].lower()}{reason[1:]}."
    return await _refused(_request, RefusedError(BAD, said, field=field))


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"There is no {request.method} {request.url.path} here. The page is at /, OpenAI's interface at /v1."
    if error.status_code not in (404, 405):
        said = f"{error.detail}."
    refusal = RefusedError(error.status_code, said)
    return JSONResponse(refusal.body, refusal.status, {**refusal.headers, **(error.headers or {})})


async def _broken(_request: Request, error: Exception) -> Response:
    return JSONResponse(RefusedError(FAILED, f"The service failed ({type(error).__name__}). See its log.").body, FAILED)
