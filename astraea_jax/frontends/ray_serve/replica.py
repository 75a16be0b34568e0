"""A replica: one engine behind Serve's HTTP and gRPC proxies."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from astraea_jax.agents import formats
from astraea_jax.engine.events import Key
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.engine.interface import Serving
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.frontends.http.app import make_app
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.flags import sampling_defaults
from astraea_jax.frontends.http.guard import Bounds, Guard
from astraea_jax.frontends.http.hosts import AllowedHosts, host_name
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.http.waiting import Limits
from astraea_jax.frontends.hub import find_model
from astraea_jax.frontends.programs import Moving, Programs, conversations_of
from astraea_jax.frontends.ray_serve.calls import Calls
from astraea_jax.frontends.ray_serve.loading import start_engine
from astraea_jax.frontends.ray_serve.names import name_of
from astraea_jax.frontends.ray_serve.options import Options
from astraea_jax.frontends.ray_serve.split import Split
from astraea_jax.frontends.rpc.servicer import Servicer
from astraea_jax.frontends.rpc.wire import SESSION_METHODS

log = logging.getLogger(__name__)

TAKEN = 4096
"""Sessions at most that a replica says it has taken over, the latest ones."""
TOLD_S = 30.0
"""Seconds for which it says so, and which sessions have ended: many reports, of which each router sees some, and the
last ones when it can tell them from late ones."""
HAND_OVER_S = 5.0
"""Seconds in which somebody must take over some programs of a replica that stops. Nobody does where a whole application
is deleted; what is not handed over is computed again."""


class Replica:
    """The class of the deployment. Serve calls its methods in one event loop, in which the engine is used.

    Args:
        options: of the app.
    """

    async def __init__(self, options: Options):  # type: ignore[misc] # Serve awaits it
        self._engine = engine = await asyncio.to_thread(start_engine, options)
        self._taken: deque[tuple[float, str]] = deque(maxlen=TAKEN)
        self._reports = 0
        self._split: Split | None = None
        keys, grammars = Keys.of(options.api_keys, options.admin_keys), GrammarCompiler(engine.tokenizer)
        self._keyed = keys.required
        with suppress(RequestError):  # it cannot be done for this tokenizer: whoever asks for a grammar is told
            grammars.prepare()
        self._programs = programs = Programs(engine, conversations_of(engine, options.turn_continuity))
        self._guard = _make_guard(options, engine, keys, grammars, programs)
        self._calls = Calls(Servicer(engine, grammars, programs), keys)
        gc.collect()
        gc.freeze()  # as in the server process: what is loaded by now stays

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return what answers HTTP; Serve asks once, after the constructor."""

        async def at_root(scope: Scope, receive: Receive, send: Send) -> None:
            if prefix := scope.get("root_path"):  # of the application; our routes know nothing of it
                scope = {**scope, "path": scope["path"].removeprefix(prefix) or "/", "root_path": ""}
            await self._guard(scope, receive, send)

        return at_root

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take in the part of the configuration that changes while the replica serves; see :class:`~.split.Split`.

        Raises:
            StartupError: it cannot be.
        """
        self._split = Split.of(user_config)

    async def Decode(self, request: bytes, grpc_context: Any) -> AsyncIterator[Any]:
        """Answer JetStream's Decode."""
        async for response in self._calls.stream("Decode", request, grpc_context):
            yield response

    def check_health(self) -> None:
        """Have Serve start the replica anew if its engine has failed.

        Raises:
            EngineDead: it has.
        """
        if not self._engine.live:
            raise EngineDead("the engine has failed; its log says why")

    def record_routing_stats(self) -> dict[str, Any]:
        """Report to the routers; a number tells a new report from one that has been sent again."""
        self._reports += 1
        since = time.monotonic() - TOLD_S
        ended = dict.fromkeys(name_of(*key) for key in _ended(self._engine, since))
        return {
            **self._engine.report().fields(),
            "number": self._reports,
            "taken": [name for taken, name in self._taken if taken > since and name not in ended],
            "ended": [*ended],
            "keyed": self._keyed,
            "session_ttl_s": self._engine.config.session_ttl_s,
            "split": None if self._split is None else asdict(self._split),
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Report to the autoscaler."""
        return {name: float(value) for name, value in self._engine.report().fields().items()}

    async def take_over(self, moving: Moving) -> None:
        """Go on with a program of another replica; its tokens are computed when there is time."""
        with suppress(RequestError, Overloaded, EngineDead):  # it is computed again when it comes back
            await self._programs.take_over(moving)
            self._taken.append((time.monotonic(), _name(moving)))

    async def __del__(self) -> None:
        """Hand the programs over and end; Serve calls it when the requests that ran have ended."""
        engine: Serving | None = getattr(self, "_engine", None)
        if engine is None:
            return
        try:
            await _hand_over(self._programs)
        except Exception as error:
            log.warning("programs were not handed over (%r); they are computed again", error)
        await asyncio.to_thread(engine.shutdown, 0)


def _single(name: str) -> Any:
    async def call(self: Replica, request: bytes, grpc_context: Any) -> Any:
        return await self._calls.single(name, request, grpc_context)

    call.__name__ = name
    call.__doc__ = f"Answer {name}."
    return call


for _method in ("HealthCheck", *SESSION_METHODS):
    setattr(Replica, _method, _single(_method))


async def _hand_over(programs: Programs) -> None:
    """Hand the programs that wait to the other replicas, each where a router places it."""
    programs.engine.drain()
    here = serve.get_replica_context()
    while moving := await programs.hand_over():
        others = serve.get_deployment_handle(here.deployment, here.app_name).options(method_name="take_over")
        async with asyncio.timeout(HAND_OVER_S):
            await asyncio.gather(*(others.options(session_id=_name(each)).remote(each) for each in moving))


def _name(moving: Moving) -> str:
    """Return the name by which routers know a program."""
    key = moving.program.key
    assert isinstance(key, tuple)  # owner and session
    return name_of(*key)


def _ended(engine: Serving, since: float) -> Iterator[Key]:
    """List the sessions that have ended, and that no engine of the replica knows again."""
    for each in engine.replicas:
        for owner, session in each.ended(since):
            if not any(other.knows(session, owner=owner) for other in engine.replicas):
                yield owner, session


def _make_guard(options: Options, engine: Serving, keys: Keys, grammars: GrammarCompiler, programs: Programs) -> Guard:
    """Make what answers HTTP, as the server process does of its flags."""
    defaults = None if options.random_weights else sampling_defaults(find_model(options.model, options.revision))
    door = Door(
        engine,
        formats.choose(engine.tokenizer, options.call_format),
        [*options.served_model_names, options.model],
        Limits(wait_s=options.max_wait_s),
        defaults,
        (),
        grammars,
        programs,
    )
    names = options.allowed_hosts
    hosts = AllowedHosts(None if names is None else [host_name(name) for name in names])
    return make_app(door, keys, Bounds(body_bytes=options.max_body_bytes), hosts=hosts)
