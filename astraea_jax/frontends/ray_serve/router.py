"""The request router: our placement of programs, in every process that calls the deployment.

A process sees its own requests only. Of what other proxies send to a replica it learns from the replica's reports, and
a session that comes by two proxies has a home in each; it is answered right in both, and computed twice at first.

Serve carries this module to its processes by value, with copies of all that it names but functions and classes of other
modules. What it shares with the proxy around it is therefore behind functions.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from astraea_jax.frontends.ray_serve.names import name_of
from astraea_jax.frontends.ray_serve.proxies import Asked, asked_of
from astraea_jax.frontends.ray_serve.split import learn
from astraea_jax.scheduler.placement import Report, ReportError
from astraea_jax.scheduler.router import NoReplica, Route, Router

log = logging.getLogger(__name__)

MAX_PROGRAMS = 100_000
"""Sessions whose homes a process remembers."""
UNKNOWN = Asked(tokens=1024)
"""A request of which nothing is known but its session."""
UNSENT_S = 60.0
"""Seconds after which a request that may be sent, and that no replica has accepted, is taken to have been given up in
the moment between: Serve tells nobody of that."""
LATE_S = 10.0
"""Age of a report beyond which it is not expected to come: several times the period in which replicas are asked."""
END = "End"
"""Method that ends a session."""


@dataclass(frozen=True)
class _Routed:
    """A request on its way."""

    route: Route
    program: str | None
    """Name of its session, with its owner in it; see :mod:`.names`."""
    tokens: int
    ends: bool
    """Whether its session ends with it."""
    chosen: float
    """Time at which its replica was chosen."""
    future: asyncio.Future[Any]
    """Of Serve, which has ended once the request may be sent."""
    accepted: bool = False


class ProgramRouter(RequestRouter):  # type: ignore[misc] # Ray's types are not looked at
    """Sends each request of a session where its KV is, unless another replica is so much better that it moves."""

    def initialize_state(self, **options: Any) -> None:
        """Begin; Serve calls it once.

        Args:
            options: ``request_router_kwargs``: ``max_programs``.
        """
        self._router = Router(max_programs=int(options.get("max_programs", MAX_PROGRAMS)))
        self._routed: dict[str, _Routed] = {}
        self._numbers: dict[ReplicaID, int] = {}  # of the last report
        self._keyed = True
        """Whether callers have keys, as replicas say."""
        self._ttl_s = math.inf
        """Seconds without a request after which replicas forget a session, as they say."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take in which replicas there are and what they report; the controller sends it when anything changes."""
        now = time.monotonic()
        here = {each.replica_id for each in replicas}
        for gone in [each for each in self._router.replicas if each not in here]:
            self._leave(gone, now)
        for each in replicas:
            self._router.join(each.replica_id, now)
            self._take_in(each.replica_id, each.routing_stats, now)
        for request, routed in [*self._routed.items()]:
            if not routed.accepted and routed.future.done() and now - routed.chosen > UNSENT_S:
                self._release(request)
        self._router.expire(now - self._ttl_s)
        split = next((found for each in replicas if (found := (each.routing_stats or {}).get("split"))), None)
        learn(self.app_name, split)
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica; its programs are placed like new ones."""
        super().on_replica_actor_died(replica_id)
        self._leave(replica_id, time.monotonic())

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replica of a request, and behind it the others, for if that one is full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # after all of these, and not between them
        chosen = self._choose(pending_request)
        first = [each for each in candidate_replicas if each.replica_id == chosen]
        return [ranks for ranks in (first, [each for each in candidate_replicas if each not in first]) if ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note that a replica has accepted a request; if it is another than was chosen, the session lives there now."""
        request = pending_request.metadata.internal_request_id
        routed = self._routed.get(request)
        if routed is None:
            return
        if routed.route.replica != replica_id:
            self._release(request)
            if routed.program is not None:
                self._router.settle(routed.program, replica_id, time.monotonic())
        else:
            self._routed[request] = replace(routed, accepted=True)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Note that a request has ended, or was rejected."""
        self._release(internal_request_id)

    def _choose(self, pending: PendingRequest) -> ReplicaID | None:
        """The replica of a request; None: nobody is better than another."""
        metadata = pending.metadata
        request = metadata.internal_request_id
        before = self._routed.get(request)
        avoid = frozenset() if before is None else frozenset({before.route.replica})
        self._release(request)
        asked = asked_of(metadata.request_id) or UNKNOWN
        owner = asked.caller.owner(self._keyed)
        program, parent = (name_of(owner, each) if each else None for each in (metadata.session_id, asked.parent))
        try:
            route = self._router.route(program, max(1, asked.tokens), time.monotonic(), parent=parent, avoid=avoid)
        except NoReplica:
            return None
        ends = metadata.call_method == END
        self._routed[request] = _Routed(route, program, asked.tokens, ends, time.monotonic(), pending.future)
        pending.future.add_done_callback(lambda future: self._given_up(request, future))
        return route.replica

    def _given_up(self, request: str, future: asyncio.Future[Any]) -> None:
        """Release what a client has given up before it was sent anywhere."""
        if future.cancelled():
            self._release(request)

    def _release(self, request: str) -> None:
        routed = self._routed.pop(request, None)
        if routed is not None:
            context, last = (routed.tokens, routed.ends) if routed.accepted else (0, False)
            self._router.ended(routed.route, time.monotonic(), context=context, last=last)

    def _leave(self, replica: Any, now: float) -> None:
        self._router.leave(replica, now)
        self._numbers.pop(replica, None)

    def _take_in(self, replica: ReplicaID, stats: Mapping[str, Any], now: float) -> None:
        """Take in a report, if it is a new one."""
        if not stats or stats.get("number") == self._numbers.get(replica):
            return
        self._numbers[replica] = stats.get("number")  # type: ignore[assignment] # compared only
        try:
            self._router.report(replica, Report.from_fields(stats), now)
        except ReportError as error:
            log.warning("the report of %s is ignored: %s", replica, error)
        self._keyed = bool(stats.get("keyed", self._keyed))
        if isinstance(ttl_s := stats.get("session_ttl_s"), int | float):
            self._ttl_s = ttl_s
        for program in stats.get("taken", ()):
            if self._router.home(program) is None:
                self._router.settle(program, replica, now)
        for program in stats.get("ended", ()):
            self._router.gone(program, replica, now - LATE_S)
