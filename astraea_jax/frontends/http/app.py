"""The app: the routers of all APIs behind one guard."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from astraea_jax.frontends.http import chat, completions, messages, operations, responses, sessions, tokens
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.errors import Failure, anthropic_status, failure_of
from astraea_jax.frontends.http.guard import Bounds, Guard, Shape
from astraea_jax.frontends.http.hosts import AllowedHosts
from astraea_jax.frontends.http.responses_background import Background
from astraea_jax.frontends.http.responses_store import ResponseStore
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.operating import Operator

ROUTERS: tuple[APIRouter, ...] = (
    chat.router,
    completions.router,
    responses.router,
    messages.router,
    tokens.router,
    sessions.router,
    operations.router,
)


def make_app(
    door: Door,
    keys: Keys | None = None,
    bounds: Bounds | None = None,
    operator: Operator | None = None,
    hosts: AllowedHosts | None = None,
) -> Guard:
    """Make the ASGI app.

    Args:
        door: leads to the engine.
        keys: of the tenants; none by default.
        bounds: on requests.
        operator: what the operator's routes show.
        hosts: names by which the server may be called; any by default.
    """
    app = FastAPI(title="astraea_jax", version=version("astraea-jax"), docs_url=None, redoc_url=None)
    app.state.door = door
    app.state.bounds = bounds = bounds or Bounds()
    app.state.responses = ResponseStore()
    app.state.operator = operator or Operator.of(door.engine, door.names[0], continued=door.programs.continued)
    app.state.keys = keys = keys or Keys()
    for router in ROUTERS:
        app.include_router(router)
    for kind in (RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
    guard = Guard(app, keys, shape_of, bounds, hosts or AllowedHosts())
    app.state.background = Background(guard.running)
    return guard


def shape_of(path: str) -> Shape:
    """Return the shape of errors on a path: OpenAI's, but for Anthropic's API."""
    return _anthropic if path.startswith("/v1/messages") else _openai


def _openai(failure: Failure, request_id: str) -> JSONResponse:
    return JSONResponse(failure.openai(), failure.status, failure.headers)


def _anthropic(failure: Failure, request_id: str) -> JSONResponse:
    return JSONResponse(messages.error_body(failure, request_id), anthropic_status(failure.status), failure.headers)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return shape_of(request.url.path)(failure_of(error), request.state.request_id)
