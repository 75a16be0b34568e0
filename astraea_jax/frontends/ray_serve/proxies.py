"""What Serve's HTTP proxies do for our clients, beside passing their requests on: an ASGI middleware.

A proxy looks for one header to find a session, and agents send many; here all that we know become that one. And where
a replica dies, Serve ends a request with 500, or cuts its stream; our clients get what our own server tells them.
Serve takes the middleware up if its processes have, in their environment,
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=astraea_jax.frontends.ray_serve.proxies.middlewares``.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from astraea_jax.errors import EngineDead, RequestError
from astraea_jax.frontends.http.app import shape_of
from astraea_jax.frontends.http.errors import Failure, failure_of
from astraea_jax.frontends.http.guard import REQUEST_ID
from astraea_jax.frontends.http.messages import error_body
from astraea_jax.frontends.identity import NAMINGS, Identity, identify
from astraea_jax.frontends.ray_serve.names import NOBODY, Caller, caller_of, name_of
from astraea_jax.frontends.ray_serve.split import SPLITS

SESSION, PARENT = NAMINGS[0].session, NAMINGS[0].parent
BYTES_PER_TOKEN = 4
"""Of a request, roughly, whatever its form. Placement weighs prompts against each other; nothing depends on it."""
GONE = "the replica that answered has gone"

_SESSION_PATH = re.compile(r".*/v1/sessions/(.+?)(?:/fork|/replace_tail)?")


@dataclass(frozen=True)
class Asked:
    """What a proxy knows of a request, and Serve's routers do not."""

    tokens: int
    """Tokens of its prompt, roughly."""
    parent: str | None = None
    """Session that its own begins with."""
    caller: Caller = NOBODY


class Requests:
    """Requests that a proxy has taken, by their id: the latest ones, for the router, which runs in the same process.

    Args:
        most: remembered at once; older ones have been routed.
    """

    def __init__(self, most: int = 4096):
        self._most = most
        self._asked: OrderedDict[str, Asked] = OrderedDict()

    def put(self, request_id: str, asked: Asked) -> None:
        """Remember a request; of two with one id the later one counts."""
        self._asked[request_id] = asked
        self._asked.move_to_end(request_id)
        if len(self._asked) > self._most:
            self._asked.popitem(last=False)

    def get(self, request_id: str) -> Asked | None:
        """Look a request up."""
        return self._asked.get(request_id)


REQUESTS = Requests()
"""Those of this process."""


def asked_of(request_id: str) -> Asked | None:
    """Look up a request that a proxy in this process has taken."""
    return REQUESTS.get(request_id)


def middlewares() -> list[Middleware]:
    """Return the middleware, as Serve's callback must."""
    return [Middleware(Front)]


class Front:
    """An ASGI app around a proxy's.

    Args:
        app: passes requests on to replicas.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, key = _named(scope)
        path = scope["path"]
        path = path[max(0, path.find("/v1/")) :]  # as the replica sees it, whatever prefix its application has
        if not SPLITS.covers(scope["path"]) and not path.startswith("/-/") and (chosen := SPLITS.choose(key)):
            scope["path"] = chosen[1] + scope["path"]
            scope["raw_path"] = chosen[1].encode() + scope.get("raw_path", b"")
        answer = _Answer(send)
        await self._app(scope, receive, answer)
        if not answer.begun:
            failure = failure_of(EngineDead(GONE))
            await shape_of(path)(failure, request_id)(scope, receive, send)
        elif not answer.ended:
            event = _last_event(path, failure_of(EngineDead(GONE)), request_id) if answer.events else b""
            await send({"type": "http.response.body", "body": event, "more_body": False})


class _Answer:
    """Passes an answer on, and sees how far it has come."""

    def __init__(self, send: Send):
        self._send = send
        self.begun = self.ended = self.events = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            self.events = (Headers(raw=message["headers"]).get("content-type") or "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body")
        await self._send(message)


def _named(scope: Scope) -> tuple[str, str]:
    """Give a request an id and the header of its session, if it has none; returns the id, and a key for a split."""
    headers = Headers(scope=scope)
    added: list[tuple[str, str]] = []
    request_id = headers.get("x-request-id", "")
    if not REQUEST_ID.fullmatch(request_id):
        request_id = uuid.uuid4().hex
        scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() != b"x-request-id"]
        added.append(("x-request-id", request_id))
    try:
        identity = identify(headers)
    except RequestError:  # the replica says what is wrong with it
        identity = Identity()
    session, parent = identity.session, identity.parent
    if session is None and (found := _SESSION_PATH.fullmatch(unquote(scope["path"]))):
        session = found[1]
    if session is not None and not headers.get(SESSION):
        added.append((SESSION, session))
        if parent is not None and PARENT is not None:
            added.append((PARENT, parent))
    scope["headers"] = [*scope["headers"], *((key.encode(), value.encode("latin-1", "ignore")) for key, value in added)]
    length = headers.get("content-length", "")
    tokens = int(length[:18]) // BYTES_PER_TOKEN if length.isdecimal() else 0
    caller = caller_of(headers, (scope.get("client") or ("unknown",))[0])
    REQUESTS.put(request_id, Asked(tokens, parent, caller))
    named = headers.get(SESSION) or session
    return request_id, request_id if named is None else name_of(caller.owner(True), named)


def _last_event(path: str, failure: Failure, request_id: str) -> bytes:
    """Return the event by which a stream says that it has failed."""
    if path.startswith("/v1/messages"):
        return b"event: error\ndata: " + json.dumps(error_body(failure, request_id)).encode() + b"\n\n"
    return b"data: " + json.dumps(failure.openai()).encode() + b"\n\n"
