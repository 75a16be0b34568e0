"""The serving loop on a virtual clock: the same scheduler, with a cost model in the device's place.

The loop is the engine's: plan and dispatch a step while the one before runs, then commit that one. Where nothing can
happen for a while (every row decodes, nobody waits who could start, nothing arrives) several steps are taken at once;
they are the steps that would have been taken one by one.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from ..config import SchedulerConfig, SchedulerStats
from ..costs import prefilled_pairs
from ..plan import Plan
from ..policy import Policy
from ..program import Rejected, Request
from ..scheduler import Scheduler
from ..transfer import HostTier, Transfer
from ..windows import Window
from .machines import Machine
from .trace import TraceProgram

STRIDE = 64
"""Steps taken at once at most."""
IDLE_S = 0.1
"""Seconds after which an idle loop asks again whether somebody may start."""


@dataclass
class ProgramRecord:
    """The history of a program. Times in seconds since the beginning."""

    program: TraceProgram
    arrival: float
    ended: float = -1.0
    queue_s: float = 0.0
    spans: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Four times of each request: submitted, first scheduled, first token, end."""

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
    """Tokens of KV that live programs held in the mean, tool waits included: what unlimited memory would hold."""
    refused: int
    """Programs larger than the whole pool."""
    page_size: int
    """Tokens of a page."""
    plans: list[tuple[float, tuple[tuple[int, int, int], ...]]] | None = None
    """Each plan as its time and (request, start, tokens) of its rows, if asked for."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the simulated engine."""

    pool_tokens: int
    page_size: int = 64
    max_seqs: int = 256
    max_step_tokens: int = 2048
    host_tokens: int = 0
    """Tokens of the host tier; 0: none."""
    staging_tokens: int = 65536
    window_tokens: int = 0
    """Tokens of the pool of layers with a window, if the machine's model has such layers."""

    def config(self, longest: int, machine: Machine) -> SchedulerConfig:
        host = HostTier(self.host_tokens // self.page_size, self.staging_tokens // self.page_size, machine.layers)
        window_pages = self.window_tokens // self.page_size + 1
        return SchedulerConfig(
            num_pages=max(1, self.pool_tokens // self.page_size) + 1,
            page_size=self.page_size,
            max_seqs=self.max_seqs,
            max_step_tokens=self.max_step_tokens,
            max_context=longest,
            max_waiting=1_000_000,
            max_programs=1_000_000,
            session_ttl_s=float("inf"),
            host=host if self.host_tokens else HostTier(),
            window=Window(machine.window, window_pages) if machine.window else None,
        )


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
        self._machine, self._sizes = machine, sizes
        self.scheduler = Scheduler(sizes.config(max(p.longest for p in programs) + 1, machine), policy)
        self._records = {p.id: ProgramRecord(p, p.arrival_s or 0.0) for p in programs}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        self._requests: dict[Request, tuple[ProgramRecord, int]] = {}
        self._link = [0.0, 0.0]  # when each direction is free
        self._plans: list[tuple[float, tuple[tuple[int, int, int], ...]]] | None = [] if record_plans else None
        self._held = 0  # tokens of KV of all live programs
        self._held_area = self._held_at = 0.0
        self._refused = 0
        for p in programs:
            self._at(p.arrival_s or 0.0, partial(self._submit, self._records[p.id], 0))

    def run(self) -> Outcome:
        """Run until every program has ended."""
        now, end = 0.0, 0.0  # the time, and when the step in flight ends
        spent, steps = 0.0, 0
        running: tuple[Plan, int] | None = None
        while True:
            while self._events and self._events[0][0] <= now:
                when, _, event = heapq.heappop(self._events)
                event(when)
            began = time.perf_counter()
            plan = self.scheduler.plan(now)
            spent += time.perf_counter() - began
            for transfer in self.scheduler.take_transfers()[0]:
                self._start(transfer, now)
            launched, next_plan = None, now
            if plan is not None:
                if self._plans is not None:
                    rows = zip((s.number for s in plan.requests), plan.starts.tolist(), plan.counts.tolist())
                    self._plans.append((now, tuple(rows)))
                times, next_plan, next_end = self._launch(plan, max(now, end))
                launched = (plan, times)
                steps += times
            if running is not None:
                now = end
                began = time.perf_counter()
                self._commit(*running, now)
                spent += time.perf_counter() - began
            elif launched is None:
                waiting = self.scheduler.stats().waiting
                if not self._events and not waiting:
                    break
                soon = now + IDLE_S if waiting else math.inf
                now = min(soon, self._events[0][0]) if self._events else soon
            running = launched
            if launched is not None:
                now, end = max(now, next_plan), next_end
        return self._outcome(now, steps, spent)

    def _launch(self, plan: Plan, start: float) -> tuple[int, float, float]:
        """Start a step; returns how many equal ones it stands for, when the last of them starts, and when that ends."""
        costs = self._machine.steps
        step_s = costs.step_s(len(plan.requests), plan.tokens, plan.context, prefilled_pairs(plan))
        self.scheduler.observe(plan, step_s)
        quiet = (self._events[0][0] - start) / step_s if self._events else STRIDE
        times = self.scheduler.extend(plan, min(STRIDE, 1 + int(quiet))) if quiet > 1 else 1
        growth = costs.per_context_s * len(plan.requests)
        last = step_s + growth * (times - 1)
        end = start + times * step_s + growth * times * (times - 1) / 2
        return times, end - last, end

    # -- events ------------------------------------------------------------------------------------------------

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, event))

    def _submit(self, record: ProgramRecord, index: int, when: float) -> None:
        trace = record.program.requests[index]
        try:
            request = self.scheduler.submit(
                prompt_of(record.program, index),
                trace.output,
                program=record.program.id,
                owner=record.program.owner,
                final=trace.tool is None,
                now=when,
            )
        except Rejected:
            self._refused += 1
            self._end(record, when)
            self.scheduler.end_program(record.program.id, when)
        else:
            self._requests[request] = record, index

    def _start(self, transfer: Transfer, now: float) -> None:
        way = 0 if transfer.to_host else 1
        tokens, in_windows = (len(ids) * self._sizes.page_size for ids in (transfer.pages, transfer.windows))
        self._link[way] = max(self._link[way], now) + self._machine.transfer_s(tokens, in_windows)
        self._at(self._link[way], partial(self.scheduler.transferred, transfer))

    def _commit(self, plan: Plan, times: int, now: float) -> None:
        for _ in range(times - 1):  # nothing can end before the last
            self.scheduler.commit(plan, [request.num_tokens for request in plan.requests[: plan.samples]], now)
        # A sampled token is its position, as in the prompts: so the next prompt repeats it.
        tokens = [request.num_tokens for request in plan.requests[: plan.samples]]
        for request in self.scheduler.commit(plan, tokens, now)[0]:
            if request.finish_reason is not None:
                self._finished(request, now)

    def _finished(self, request: Request, now: float) -> None:
        record, index = self._requests.pop(request)
        record.queue_s += (request.first_scheduled or now) - request.submitted
        record.spans.append((request.submitted, request.first_scheduled or now, request.first_token or now, now))
        trace = record.program.requests[index]
        self._hold(trace.context - (record.program.requests[index - 1].context if index else 0), now)
        if trace.tool is None:
            self._end(record, now)
        else:
            self.scheduler.waits(record.program.id, trace.wait, now)
            self._at(now + trace.tool_s, partial(self._submit, record, index + 1))

    def _end(self, record: ProgramRecord, now: float) -> None:
        record.ended = now
        done = len(record.spans)
        self._hold(-(record.program.requests[done - 1].context if done else 0), now)

    def _hold(self, tokens: int, now: float) -> None:
        self._held_area += self._held * (now - self._held_at)
        self._held, self._held_at = self._held + tokens, now

    def _outcome(self, now: float, steps: int, spent: float) -> Outcome:
        return Outcome(
            records=list(self._records.values()),
            stats=self.scheduler.stats(),
            makespan_s=now,
            steps=steps,
            scheduler_s=spent,
            mean_live_context=self._held_area / now if now else 0.0,
            refused=self._refused,
            page_size=self.scheduler.config.page_size,
            plans=self._plans,
        )


def prompt_of(program: TraceProgram, index: int) -> Sequence[int]:
    """Make the tokens of a request's prompt.

    A token is its position, so that a prompt repeats exactly what the trace says is cached; what replaces earlier
    text, as after a compaction, gets tokens of its own.
    """
    requests = program.requests[: index + 1]
    if all(s.cached == before.context for before, s in pairwise(requests)):
        return range(requests[-1].prompt)
    text: list[int] = []
    for i, request in enumerate(requests):
        del text[request.cached :]
        text += range(10**9 * i + len(text), 10**9 * i + len(text) + request.new)
        if i < index:
            text += range(request.prompt, request.context)
    return text
