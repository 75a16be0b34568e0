"""Routes for operators."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from astraea_jax.engine.lifecycle import State
from astraea_jax.frontends.http.calls import door_of

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Whether the server lives: 503 once its engine has ended, so that it is started again."""
    state = door_of(request).engine.state
    return JSONResponse({"status": state.value}, 503 if state is State.DEAD else 200)


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether the server takes requests: 503 while it compiles and while it shuts down."""
    door = door_of(request)
    serves = door.engine.live and not door.draining
    return JSONResponse({"status": "draining" if door.draining else door.engine.state.value}, 200 if serves else 503)
