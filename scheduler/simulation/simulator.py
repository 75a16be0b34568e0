"""Runs of programs through a simulated engine, and their history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple
from zlib import crc32

from ..config import SchedulerStats
from ..policy import Policy
from ..prefix import salted
from ..program import Rejected, Request
from ..scheduler import Scheduler
from .engine import STRIDE, Clock, SimulatedEngine, Sizes
from .machines import Machine
from .trace import TraceProgram

SALT = salted("simulation")
"""Of all programs that begin like others."""


@dataclass
class ProgramRecord:
    """The history of a program. Times in seconds since the beginning."""

    program: TraceProgram
    arrival: float
    parent: ProgramRecord | None = None
    """The program that has begun it."""
    ended: float = -1.0
    queue_s: float = 0.0
    spans: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Four times of each request: submitted, first scheduled, first token, end."""
    awaited: int = 0
    """Programs that it has begun and that have not ended."""
    resumes: float = 0.0
    """Time before which its next request does not come."""
    cached_tokens: int = 0
    """Tokens of its prompts that need not be computed."""

    @property
    def jct_s(self) -> float:
        return self.ended - self.arrival

    @property
    def jct_no_tool_s(self) -> float:
        return self.jct_s - self.program.tool_s

    @property
    def job_times(self) -> list[float]:
        """Completion times of its jobs, each from the submission of its first request to its last token."""
        found: list[float] = []
        began: float | None = None
        for request, (submitted, _, _, ended) in zip(self.program.requests, self.spans, strict=False):
            began = submitted if began is None else began
            if request.human or request.tool is None:
                found.append(ended - began)
                began = None
        return found


@dataclass
class Outcome:
    """Result of a run: the history of every program, and what the scheduler counted."""

    records: list[ProgramRecord]
    stats: SchedulerStats
    makespan_s: float
    steps: int
    scheduler_s: float
    """Real seconds spent in ``plan`` and ``commit``."""
    mean_live_context: float
    """Tokens of KV that live programs held in the mean, tool waits included: what unlimited memory would hold. What
    they have not begun themselves does not count."""
    refused: int
    """Programs larger than the whole pool."""
    page_size: int
    """Tokens of a page."""
    plans: list[tuple[float, tuple[tuple[int, int, int], ...]]] | None = None
    """Each plan as its time and (request, start, tokens) of its rows, if asked for."""

    @property
    def served(self) -> list[ProgramRecord]:
        """Programs that somebody has asked for and that got anything: not those that other programs have begun."""
        return [record for record in self.records if record.spans and record.parent is None]


class Due(NamedTuple):
    """A request that comes."""

    when: float
    record: ProgramRecord
    number: int
    """Which one of its program."""


class History:
    """What has happened to every program, and how much KV they hold."""

    def __init__(self, programs: Sequence[TraceProgram]):
        self.records = [ProgramRecord(p, p.arrival_s or 0.0) for p in programs]
        self.open = len(self.records)
        """Programs that have not ended."""
        self._held = 0  # tokens of KV of all live programs
        self._held_area = self._held_at = 0.0
        self._refused = 0

    def request_ended(self, record: ProgramRecord, index: int, request: Request, now: float) -> list[Due]:
        """A request has ended, and with the last one its program; returns the requests that follow."""
        began, answered = (now if at is None else at for at in (request.first_scheduled, request.first_token))
        record.cached_tokens += request.cached_tokens
        record.queue_s += began - request.submitted
        record.spans.append((request.submitted, began, answered, now))
        trace = record.program.requests[index]
        self._hold(trace.context - self._own(record, index), now)
        if trace.tool is None:
            return self._end(record, now)
        record.resumes, record.awaited = now + trace.tool_s, len(trace.children)
        children = [ProgramRecord(child, now, record) for child in trace.children]
        self.records += children
        self.open += len(children)
        return [Due(now, child, 0) for child in children] or [Due(record.resumes, record, index + 1)]

    def refuse(self, record: ProgramRecord, now: float) -> list[Due]:
        """A program has ended because its next request is larger than the pool; returns the requests that follow."""
        self._refused += 1
        return self._end(record, now)

    def outcome(self, engines: Sequence[SimulatedEngine]) -> Outcome:
        """The result of a run by these engines."""
        now = max(engine.now for engine in engines)
        return Outcome(
            records=self.records,
            stats=engines[0].scheduler.stats(),
            makespan_s=now,
            steps=sum(engine.steps for engine in engines),
            scheduler_s=sum(engine.scheduler_s for engine in engines),
            mean_live_context=self._held_area / now if now else 0.0,
            refused=self._refused,
            page_size=engines[0].scheduler.config.page_size,
            plans=engines[0].plans,
        )

    def _end(self, record: ProgramRecord, now: float) -> list[Due]:
        record.ended = now
        self.open -= 1
        self._hold(record.program.shared - self._own(record, len(record.spans)), now)
        parent = record.parent
        if parent is None:
            return []
        parent.awaited -= 1
        return [] if parent.awaited else [Due(max(now, parent.resumes), parent, len(parent.spans))]

    @staticmethod
    def _own(record: ProgramRecord, index: int) -> int:
        """Tokens of a program's text before a request; of nothing that it shares with others it is the owner."""
        return record.program.requests[index - 1].context if index else record.program.shared

    def _hold(self, tokens: int, now: float) -> None:
        self._held_area += self._held * (now - self._held_at)
        self._held, self._held_at = self._held + tokens, now


class Simulator:
    """Runs programs through a scheduler.

    Args:
        programs: with arrivals set.
        policy: of the scheduler.
        machine: that it pretends to run on.
        sizes: of the engine.
        record_plans: keep every plan in the outcome.
    """

    def __init__(
        self,
        programs: Sequence[TraceProgram],
        policy: Policy,
        machine: Machine,
        sizes: Sizes,
        *,
        record_plans: bool = False,
    ):
        config = sizes.config(max(p.longest for p in programs) + 1, machine)
        self._clock = Clock()
        self._history = History(programs)
        self._engine = SimulatedEngine(
            *(config, policy, machine, self._clock), self._finished, stride=STRIDE, record_plans=record_plans
        )
        self.scheduler = self._engine.scheduler
        self._requests: dict[Request, tuple[ProgramRecord, int]] = {}
        for record in self._history.records:
            self._arrive(record.arrival, record, 0)

    def run(self) -> Outcome:
        """Run until every program has ended."""
        play(self._clock, [self._engine])
        return self._history.outcome([self._engine])

    def _arrive(self, when: float, record: ProgramRecord, index: int) -> None:
        submit = partial(self._submit, record, index)
        self._clock.at(when, lambda now: self._engine.deliver(now, submit))

    def _submit(self, record: ProgramRecord, index: int, when: float) -> None:
        request = submit(self.scheduler, record, index, when)
        if request is None:
            self._follow(self._history.refuse(record, when))
        else:
            self._requests[request] = record, index

    def _finished(self, request: Request, now: float) -> None:
        record, index = self._requests.pop(request)
        trace = record.program.requests[index]
        if trace.tool is not None:
            self.scheduler.waits(record.program.id, trace.wait, now)
        self._follow(self._history.request_ended(record, index, request, now))

    def _follow(self, requests: Sequence[Due]) -> None:
        for due in requests:
            self._arrive(*due)


def play(clock: Clock, engines: Sequence[SimulatedEngine]) -> None:
    """Let events happen and engines go on, in the order of time, until nothing is left to do.

    Engines that join while it runs are noticed.
    """
    while True:
        engine = min(engines, key=attrgetter("next_s"), default=None)
        if engine is not None and engine.next_s < clock.next_s:
            engine.go_on()
        elif clock.next_s < math.inf:
            clock.happen()
        else:
            break


def submit(scheduler: Scheduler, record: ProgramRecord, index: int, now: float) -> Request | None:
    """Submit a request of a program; None: it is too large, so its program ends."""
    program, trace = record.program, record.program.requests[index]
    try:
        return scheduler.submit(
            prompt_of(program, index),
            trace.output,
            program=program.id,
            owner=program.owner,
            final=trace.tool is None,
            salt=SALT if program.lineage else None,
            parent=record.parent.program.id if record.parent is not None else None,
            now=now,
        )
    except Rejected:
        scheduler.end_program(program.id, now)
        return None


def prompt_of(program: TraceProgram, index: int) -> Sequence[int]:
    """Make the tokens of a request's prompt.

    A token is its position, so that a prompt repeats exactly what the trace says is cached; what replaces earlier
    text, as after a compaction, gets tokens of its own, and so does the place where programs that begin alike part.
    """
    requests = program.requests[: index + 1]
    if program.lineage:
        shared = list(range(requests[-1].prompt))
        for at, name in program.lineage:
            shared[at] = crc32(name.encode()) >> 1
        return shared
    if all(s.cached == before.context for before, s in pairwise(requests)):
        return range(requests[-1].prompt)
    text: list[int] = []
    for i, request in enumerate(requests):
        del text[request.cached :]
        text += range(10**9 * i + len(text), 10**9 * i + len(text) + request.new)
        if i < index:
            text += range(request.prompt, request.context)
    return text
