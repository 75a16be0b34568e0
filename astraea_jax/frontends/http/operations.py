"""Routes for operators: health, metrics, the status page, profiles.

Health and the status page's empty frame need no key. Metrics need one if the server has keys. The numbers of the status
page are those of the whole server; of programs it shows

* to the admin key all of them, with the names of their sessions;
* to another key its own;
* on a server without keys all of them, but names to nobody but their owner.

Only the admin key takes profiles.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Depends, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from astraea_jax.engine.lifecycle import State
from astraea_jax.frontends.http.calls import administrator, door_of, tenant_of
from astraea_jax.frontends.metrics import CONTENT_TYPE
from astraea_jax.frontends.operating import Operator

PAGE = files(__package__).joinpath("status.html").read_text(encoding="utf-8")


def _policy(page: str) -> str:
    """Allow the page its own script and style, requests to this server, and nothing else."""

    def own(tag: str) -> str:
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(p.encode()).digest()).decode()}'" for p in parts)

    return f"default-src 'none'; connect-src 'self'; script-src {own('script')}; style-src {own('style')}"


PAGE_HEADERS = {
    "content-security-policy": _policy(PAGE) + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
NOT_KEPT = {"cache-control": "no-store"}

router = APIRouter(tags=["operations"])


def operator_of(request: Request) -> Operator:
    """Return what the app has for its operator."""
    operator: Operator = request.app.state.operator
    return operator


@router.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """Lead whoever opens the server in a browser to its status page."""
    return RedirectResponse("/status")


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


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(operator_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE, **NOT_KEPT})


@router.get("/load")
async def load(request: Request) -> JSONResponse:
    """How loaded the server is, for routers and autoscalers: the report of all its replicas together."""
    return JSONResponse(door_of(request).engine.report().fields(), headers=NOT_KEPT)


@router.get("/status")
async def status() -> HTMLResponse:
    """Show the status page, which asks for its numbers itself."""
    return HTMLResponse(PAGE, headers=PAGE_HEADERS)


@router.get("/status.json")
async def status_numbers(request: Request) -> JSONResponse:
    """Numbers of the status page."""
    tenant, keys = tenant_of(request), request.app.state.keys
    everybody = tenant.admin or not keys.required
    picture = await operator_of(request).status.picture(tenant.owner, everybody=everybody, names=tenant.admin)
    return JSONResponse(picture, headers=NOT_KEPT)


@router.post("/start_profile", dependencies=[Depends(administrator)])
async def start_profile(request: Request) -> JSONResponse:
    """Begin a profile, which ends by itself after a minute."""
    return JSONResponse({"folder": await operator_of(request).profiler.start()})


@router.post("/stop_profile", dependencies=[Depends(administrator)])
async def stop_profile(request: Request) -> JSONResponse:
    """End the profile and write it."""
    return JSONResponse({"folder": await operator_of(request).profiler.stop()})
