"""Which replica of this process has which session: the router, told of every request, and a replica that is retired."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from astraea_jax.engine.answers import MAX_HANDED
from astraea_jax.engine.calls import Call
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.events import Key
from astraea_jax.engine.generation import Ended, Generation
from astraea_jax.errors import EngineDead, Overloaded, RequestError
from astraea_jax.scheduler.handover import HandOver
from astraea_jax.scheduler.prefix import beginnings
from astraea_jax.scheduler.router import NoReplica, Route, Router

REPORT_S = 0.05
"""Seconds for which a replica is taken to be as it has said; until then the router counts what it has sent."""
LOOK_S = 0.02
"""Seconds between two looks at whether a replica that is retired still has something to do."""


class Homes:
    """Sends requests to replicas. Any thread may call it.

    Args:
        replicas: that there are, whether they serve or not.
        max_programs: sessions whose home is remembered.
        ttl_s: seconds without a request after which replicas forget a session.
    """

    def __init__(self, replicas: Sequence[Engine], max_programs: int, ttl_s: float):
        self.lock = threading.RLock()
        """Held by whoever must find a session where it was a moment ago."""
        self._replicas = tuple(replicas)
        self._router, self._ttl_s = Router(max_programs=max_programs), ttl_s
        self._reported = dict.fromkeys(self._replicas, 0.0)
        """Time at which a replica was last asked how it is."""
        self.retired: set[Engine] = set()
        """Replicas that are out of service for good, or soon will be."""
        self._over: deque[tuple[Route, int, bool]] = deque()
        """Requests that have ended and that the router has not been told of, with their context, and whether their
        session has ended, too. Anybody may add to it in any thread at any time, the collector of garbage included."""

    def of(self, session: Key | None) -> Engine | None:
        """The replica that has a session, if it lives."""
        found = self._router.home(session) if session is not None else None
        return found if isinstance(found, Engine) and found.live else None

    def settle(self, session: Key, replica: Engine) -> None:
        """A session is at a replica from now on."""
        with self.lock:
            self._look()  # it may have begun to serve since, and nobody has sent it anything
            self._router.settle(session, replica, time.monotonic())

    def busy(self, session: Key) -> bool:
        """Whether a request of a session is in progress, or on its way to its replica."""
        with self.lock:
            self._look()
            return self._router.busy(session)

    def forget(self, session: Key) -> None:
        """A session has ended."""
        with self.lock:
            self._router.forget(session)

    def least_busy(self) -> Engine:
        """The replica with the fewest requests, of those that take programs if any do, or else of those that serve."""
        return min(self._replicas, key=lambda engine: (not engine.live, engine.draining, engine.in_progress))

    def submit(self, call: Call) -> Generation:
        """Queue a call on the replica that the router chooses; what another one has of its session is given up there.

        Raises:
            Overloaded, EngineDead: no replica takes it.
        """
        prefixes = beginnings(call.prompt, call.salt) if self.of(call.session) is None else []  # takes time
        with self.lock:
            self._look()
            before = self.of(call.session)
            generation, chosen = self._submit(call, prefixes, known=before is not None)
            if before not in (None, chosen) and call.session is not None:
                with suppress(Overloaded, EngineDead):  # then it expires there
                    before.hand_over((call.session,))
        return generation

    def _submit(
        self, call: Call, prefixes: Sequence[tuple[Hashable, int]], *, known: bool
    ) -> tuple[Generation, Engine]:
        refused: frozenset[Engine] = frozenset()
        while True:
            now, tokens = time.monotonic(), len(call.prompt)
            try:
                route = self._router.route(
                    call.session, tokens, now, parent=call.parent, prefixes=prefixes, avoid=refused
                )
            except NoReplica:
                last = self.least_busy()
                return last.submit(call), last  # which says what is wrong, or drains and serves it all the same
            chosen = route.replica
            assert isinstance(chosen, Engine)
            try:
                generation = chosen.submit(call)
            except Exception as error:  # also that the caller runs no event loop
                self._router.ended(route, now, context=0)
                refused |= {chosen}
                if call.session is not None and not known:
                    self._router.forget(call.session)
                runs_there = chosen.live and self._router.busy(call.session)  # so nobody else may
                if runs_there or not isinstance(error, Overloaded | EngineDead):
                    raise
            else:
                generation.observe(partial(self._ended, route, call.final))
                weakref.finalize(generation, self._over.append, (route, 0, False)).atexit = False
                return generation, chosen

    def _ended(self, route: Route, final: bool, ended: Ended) -> None:
        usage = ended.usage
        context = usage.prompt_tokens + usage.output_tokens if usage is not None else 0
        self._over.append((route, context, final and ended.program > 0))

    def _look(self) -> None:
        """Tell the router what has happened since it was last asked."""
        now = time.monotonic()
        while self._over:
            route, context, last = self._over.popleft()
            self._router.ended(route, now, context=context, last=last)
        for replica in self._replicas:
            if not replica.live:
                self._router.leave(replica, now)
            elif now - self._reported[replica] >= REPORT_S:
                self._reported[replica] = now
                self._router.join(replica, now)
                self._router.report(replica, replica.report(), now)
                self._router.expire(now - self._ttl_s)

    # -- a replica that leaves ---------------------------------------------------------------------------------

    async def retire(self, replica: Engine, grace_s: float) -> int:
        """Take a replica out of service while the others go on. One that has not started yet never will serve.

        Sessions that come back within the grace go on there. Then they move, each as soon as it has no request in
        progress: their tokens are computed elsewhere in idle time. Requests have as long again to end.

        Returns:
            How many requests were cut off.

        Raises:
            ValueError: the grace is no time; nothing has changed then.
        """
        if not grace_s >= 0:
            raise ValueError(f"grace_s is {grace_s}; it must be a number of seconds, or 0")
        self.retired.add(replica)
        replica.drain()
        with self.lock:
            self._router.drain(replica)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < 2 * grace_s and replica.live and replica.stats().programs:
            if passed >= grace_s:
                await self._move_from(replica)
            await asyncio.sleep(min(LOOK_S, grace_s / 4))
        await self._move_from(replica)
        return await asyncio.to_thread(replica.shutdown, 0)

    async def _move_from(self, replica: Engine) -> None:
        """Let other replicas go on with the sessions of one that have no request in progress."""
        with self.lock:
            self._look()
            room = {other: other.stats().programs for other in self._replicas if not other.draining}
            if not (room and replica.live):
                return
            moving: dict[Key, Engine] = {}
            for session in self._router.idle(replica):
                assert isinstance(session, tuple)
                target = moving[session] = min(room, key=room.__getitem__)
                room[target] += 1
                self._router.settle(session, target, time.monotonic())
        names = list(moving)  # of many of them nothing may be left, so each is asked for once
        for first in range(0, len(names), MAX_HANDED):
            with suppress(EngineDead, Overloaded):  # they are computed again when they come back
                for one in await asyncio.wrap_future(replica.hand_over(names[first : first + MAX_HANDED])):
                    await self._give(one, moving)

    async def _give(self, handed: HandOver, moving: Mapping[Key, Engine]) -> None:
        """Let a session go on at its new replica, unless it has come back meanwhile or finds no room there."""
        assert isinstance(handed.key, tuple)
        target = moving[handed.key]
        with suppress(RequestError, EngineDead, Overloaded):
            await asyncio.wrap_future(target.take_over(handed))
            with self.lock:
                self._router.settle(handed.key, target, time.monotonic(), context=len(handed.tokens))
