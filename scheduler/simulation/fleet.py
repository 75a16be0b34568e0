"""A fleet: several simulated engines on one virtual clock, and a router in front of them.

A program's next request is routed when its tool has returned. Replicas report at regular times, and the router hears of
it a little later. A replica may die: what it had in progress is sent again, and its programs are computed again
elsewhere, because every request comes with its whole history. A replica may drain: it takes no more programs, keeps
those that come back for a while, and then its programs go on elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ..placement import Rule
from ..policy import Policy
from ..prefix import beginnings
from ..program import Request
from ..router import NoReplica, Route, Router
from .engine import Clock, Event, SimulatedEngine, Sizes
from .global_queue import INTERVAL_S, GlobalQueue
from .machines import Machine
from .simulator import Due, History, Outcome, ProgramRecord, play, prompt_of, submit
from .trace import TraceProgram, everyone

STRIDE = 8
"""Steps that a replica takes at once at most, so that a request waits no longer than that to be noticed."""
RETRY_S = 1.0
"""Seconds after which a request is sent again that a dead replica had, or that nobody took."""


@dataclass(frozen=True)
class Reporting:
    """How the router hears of its replicas."""

    period_s: float = 1.0
    """Seconds between two reports of a replica; 0: there are none."""
    delay_s: float = 0.05
    """Seconds that a report is under way."""


EVERY_SECOND = Reporting()


@dataclass(frozen=True)
class Change:
    """Something that happens to a replica."""

    when: float
    replica: int
    what: Literal["die", "drain", "empty", "join"]
    """It dies; it takes no more programs; it gives those that it has to others; it is there, with nothing."""


@dataclass
class FleetOutcome:
    """Result of a run of a fleet."""

    history: Outcome
    """What has happened to every program; the counts are those of one replica."""
    prompt_tokens: int
    """Tokens of all prompts that have been served."""
    cached_tokens: int
    """Those of them that the replica that served them did not have to compute."""
    moves: int
    """Times that a program has gone on elsewhere although its home was there."""
    resent: int
    """Requests sent again because their replica had died."""
    placed: Mapping[int, int]
    """Requests that each replica has ended."""

    @property
    def prefix_hit(self) -> float:
        """Share of prompts that was not computed again."""
        return self.cached_tokens / max(1, self.prompt_tokens)


@dataclass(slots=True, eq=False)
class _Sent:
    """A request under way, or its next attempt."""

    record: ProgramRecord
    index: int
    route: Route
    request: Request | None = None


class FleetSimulator:
    """Runs programs through several engines.

    Args:
        programs: with arrivals set.
        policy: makes the policy of a replica's scheduler.
        rule: of placement.
        machine: that every replica pretends to run on.
        sizes: of each.
        replicas: how many there are at the beginning.
        held_back: requests wait in ThunderAgent's global queue, which says where they go on, instead of the rule.
        steal_s: seconds after which an idle replica looks again for a waiting request to take over; 0: none does.
        reporting: how the router hears of them.
        changes: what happens to them.
    """

    def __init__(
        self,
        programs: Sequence[TraceProgram],
        policy: Callable[[], Policy],
        rule: Rule,
        machine: Machine,
        sizes: Sizes,
        replicas: int,
        *,
        held_back: bool = False,
        steal_s: float = 0.0,
        reporting: Reporting = EVERY_SECOND,
        changes: Sequence[Change] = (),
    ):
        self.router = Router(rule, max_programs=sum(1 for _ in everyone(programs)))
        self.history = History(programs)
        self.sent: dict[str, _Sent] = {}
        """Requests under way, by program."""
        self._machine, self._policy, self._reporting = machine, policy, reporting
        self._config = sizes.config(max(p.longest for p in programs) + 1, machine)
        self._clock = Clock()
        self._engines: dict[int, SimulatedEngine] = {}
        self._requests: dict[Request, _Sent] = {}
        self._playing: list[SimulatedEngine] = []
        self._dead: list[SimulatedEngine] = []
        self._at: dict[str, int] = {}  # replica that has a program's KV
        self._counts = dict.fromkeys(("prompt", "cached", "moves", "resent"), 0)
        self._placed: Counter[int] = Counter()
        self._emptied: set[int] = set()  # replicas whose programs go on elsewhere
        self._queue = GlobalQueue(sizes.pool_tokens) if held_back else None
        self._held: dict[str, tuple[ProgramRecord, int]] = {}  # requests that wait there
        if held_back:
            self._clock.at(INTERVAL_S, self._tick)
        if steal_s:
            self._clock.at(steal_s, partial(self._steal, steal_s))
        for replica in range(replicas):
            self._join(replica, 0.0)
        for change in changes:
            self._clock.at(change.when, partial(getattr(self, f"_{change.what}"), change.replica))
        self._follow(Due(record.arrival, record, 0) for record in self.history.records)

    def at(self, when: float, event: Event) -> None:
        """Let ``event(when)`` happen."""
        self._clock.at(when, event)

    def run(self) -> FleetOutcome:
        """Run until every program has ended."""
        play(self._clock, self._playing)
        outcome = self.history.outcome([*self._playing, *self._dead])
        return FleetOutcome(
            outcome,
            prompt_tokens=self._counts["prompt"],
            cached_tokens=self._counts["cached"],
            moves=self._counts["moves"],
            resent=self._counts["resent"],
            placed=dict(self._placed),
        )

    # -- replicas ----------------------------------------------------------------------------------------------

    def _join(self, replica: int, now: float) -> None:
        if replica in self._engines:
            return
        engine = SimulatedEngine(
            *(self._config, self._policy(), self._machine, self._clock),
            partial(self._ended, replica),
            first_token=self._first_token,
            stride=STRIDE,
        )
        self._engines[replica] = engine
        self._playing.append(engine)
        self.router.join(replica, now)
        if self._reporting.period_s:
            self._report(replica, engine, now)

    def _report(self, replica: int, engine: SimulatedEngine, now: float) -> None:
        """Let a replica report, now and from then on."""
        if self._engines.get(replica) is not engine or not self.history.open:
            return
        report = engine.scheduler.report(now)
        arrives = now + self._reporting.delay_s
        self._clock.at(arrives, lambda when: self.router.report(replica, report, when))
        self._clock.at(now + self._reporting.period_s, partial(self._report, replica, engine))

    def _die(self, replica: int, now: float) -> None:
        engine = self._engines.pop(replica, None)
        if engine is None:
            return
        self._playing.remove(engine)
        self._dead.append(engine)
        self.router.leave(replica, now)
        for program, at in list(self._at.items()):
            if at == replica:
                del self._at[program]
        for program, sent in list(self.sent.items()):
            if sent.route.replica == replica:
                del self.sent[program]
                self._requests.pop(sent.request, None)  # type: ignore[arg-type]
                self._counts["resent"] += 1
                self._clock.at(now + RETRY_S, partial(self._route, sent.record, sent.index))

    def _drain(self, replica: int, now: float) -> None:
        self.router.drain(replica)

    def _empty(self, replica: int, now: float) -> None:
        self.router.drain(replica)
        self._emptied.add(replica)

    # -- requests ----------------------------------------------------------------------------------------------

    def _follow(self, requests: Iterable[Due]) -> None:
        for when, record, index in requests:
            self._clock.at(when, partial(self._route, record, index))

    def _route(self, record: ProgramRecord, index: int, now: float) -> None:
        """Send a request to a replica; if there is none, later."""
        program, tokens = record.program.id, record.program.requests[index].prompt
        if self._queue is not None:
            chosen = self._queue.arrives(program, tokens, self._engines, now)
            if chosen is None:
                self._held[program] = record, index
                return
            avoid = self._engines.keys() - {chosen}
        else:
            avoid = self._emptied
        try:
            self._send(_Sent(record, index, self._place(record, index, avoid, now)), now)
        except NoReplica:
            self._clock.at(now + RETRY_S, partial(self._route, record, index))

    def _place(self, record: ProgramRecord, index: int, avoid: Collection[int], now: float) -> Route:
        """Ask the router, as the engine's replicas do (``engine/homes.py``)."""
        program, parent = record.program, record.parent
        prompt = prompt_of(program, index)
        return self.router.route(
            program.id,
            len(prompt),
            now,
            parent=parent.program.id if parent is not None else None,
            prefixes=beginnings(prompt) if program.lineage and self.router.home(program.id) is None else (),
            avoid=frozenset(avoid),
        )

    def _send(self, sent: _Sent, now: float) -> None:
        """Hand a request to its replica; if that is not its program's home, the KV that is there is given up."""
        program, replica = sent.record.program.id, sent.route.replica
        assert program not in self.sent, f"{program} is served twice at once"
        assert isinstance(replica, int)
        before = self._at.get(program)
        if before is not None and before != replica:
            self._counts["moves"] += 1
            old = self._engines[before]
            old.deliver(now, partial(old.scheduler.end_program, program))
        self._at[program], self.sent[program] = replica, sent
        self._engines[replica].deliver(now, partial(self._submit, self._engines[replica], sent))

    def _tick(self, now: float) -> None:
        """Let the global queue pause programs, and resume others."""
        assert self._queue is not None
        for program in self._queue.tick(self._engines, self.sent, now):
            if program in self._held:
                self._route(*self._held.pop(program), now)
        if self.history.open:
            self._clock.at(now + INTERVAL_S, self._tick)

    def _steal(self, period_s: float, now: float) -> None:
        """Let every replica with room, and nobody who waits, take over a request that has waited for long elsewhere.

        It takes the one with the least prefill per second of wait saved. A request is taken to wait as long again as it
        has waited.
        """
        for replica, engine in self._engines.items():
            report = engine.scheduler.report(now)
            if report.waiting or engine.due or replica in self._emptied:
                continue
            room, found = report.free + report.retained, []
            for sent in self.sent.values():
                request = sent.request
                if request is not None and request.first_scheduled is None and request.slot < 0:
                    waited_s, cost_s = now - request.submitted, report.prefill_s * request.num_tokens
                    if request.num_tokens < room and cost_s < waited_s and sent.route.replica != replica:
                        found.append((cost_s / waited_s, request.number, sent))
            if found:
                self._take_over(min(found)[-1], replica, now)
        if self.history.open:
            self._clock.at(now + period_s, partial(self._steal, period_s))

    def _take_over(self, sent: _Sent, replica: int, now: float) -> None:
        """Cancel a request that waits, and send it to another replica."""
        assert sent.request is not None
        del self._requests[sent.request]
        self._over(sent, 0, now)
        route = self._place(sent.record, sent.index, self._engines.keys() - {replica}, now)
        self._send(_Sent(sent.record, sent.index, route), now)

    def _submit(self, engine: SimulatedEngine, sent: _Sent, now: float) -> None:
        sent.request = submit(engine.scheduler, sent.record, sent.index, now)
        if sent.request is not None:
            self._requests[sent.request] = sent
            return
        self._over(sent, 0, now)
        self._forget(sent.record.program.id)
        self._follow(self.history.refuse(sent.record, now))

    def _first_token(self, request: Request, now: float) -> None:
        self.router.prefilled(self._requests[request].route)

    def _ended(self, replica: int, request: Request, now: float) -> None:
        sent = self._requests.pop(request)
        record, trace = sent.record, sent.record.program.requests[sent.index]
        self._over(sent, trace.context, now)
        self._placed[replica] += 1
        self._counts["prompt"] += trace.prompt
        self._counts["cached"] += request.cached_tokens
        if trace.tool is None:
            self._forget(record.program.id)
        else:
            if self._queue is not None:
                self._queue.ended(record.program.id, trace.context, now)
            self._engines[replica].scheduler.waits(record.program.id, trace.wait, now)
        self._follow(self.history.request_ended(record, sent.index, request, now))

    def _over(self, sent: _Sent, context: int, now: float) -> None:
        self.router.ended(sent.route, now, context=context)
        del self.sent[sent.record.program.id]

    def _forget(self, program: str) -> None:
        """A program has ended."""
        self.router.forget(program)
        del self._at[program]
        if self._queue is not None:
            self._queue.forget(program)

    def check(self) -> None:
        """Raise AssertionError unless replicas, router and what is under way agree (for tests; O(everything))."""
        at = Counter(self._at.values())
        for replica, engine in self._engines.items():
            engine.scheduler.check()
            assert self.router.fleet.requests[self.router.index(replica)] == sum(
                sent.route.replica == replica for sent in self.sent.values()
            )
            if not engine.due:  # nothing that it has not noticed yet
                assert engine.scheduler.stats().programs == at[replica], "programs do not add up"
        assert len(self._at) <= len(self.router) <= self.history.open
