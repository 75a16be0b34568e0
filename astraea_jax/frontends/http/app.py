"""The app: the routers of all APIs behind one guard."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from astraea_jax.frontends.http import chat, completions, messages, operations, responses, tokens
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.errors import Failure, failure_of
from astraea_jax.frontends.http.guard import Bounds, Guard, Shape
from astraea_jax.frontends.http.responses_store import ResponseStore
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.operating import Operator

ROUTERS: tuple[APIRouter, ...] = (
    chat.router,
    completions.router,
    responses.router,
    messages.router,
    tokens.router,
    operations.router,
)
SHAPES: Mapping[str, Shape] = {"/v1/messages": messages.error_body}
"""Beginning of a path -> shape of its errors. All others are in OpenAI's."""


def make_app(
    door: Door, keys: Keys | None = None, bounds: Bounds | None = None, operator: Operator | None = None
) -> Guard:
    """Make the ASGI app.

    Args:
        door: leads to the engine.
        keys: of the tenants; none by default.
        bounds: on requests.
        operator: what the operator's routes show.
    """
    app = FastAPI(title="astraea_jax", version=version("astraea-jax"), docs_url=None, redoc_url=None)
    app.state.door = door
    app.state.bounds = bounds = bounds or Bounds()
    app.state.responses = ResponseStore()
    app.state.operator = operator or Operator.of(door.engine, door.names[0])
    app.state.keys = keys = keys or Keys()
    for router in ROUTERS:
        app.include_router(router)
    for kind in (RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
    return Guard(app, keys, shape_of, bounds)


def shape_of(path: str) -> Shape:
    """Return the shape of errors on a path."""
    return next((shape for begin, shape in SHAPES.items() if path.startswith(begin)), _openai)


def _openai(failure: Failure, request_id: str) -> dict[str, object]:
    return failure.openai()


async def _answer(request: Request, error: Exception) -> JSONResponse:
    failure = failure_of(error)
    content = shape_of(request.url.path)(failure, request.state.request_id)
    return JSONResponse(content, failure.status, failure.headers)
