"""A simulated engine: the serving loop on a virtual clock, with a cost model in the device's place.

The loop is the engine's: plan and dispatch a step while the one before runs, then commit that one. Where nothing can
happen for a while (every row decodes, nobody waits who could start, nothing arrives) several steps are taken at once;
they are the steps that would have been taken one by one.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..config import SchedulerConfig
from ..plan import Plan
from ..policy import Policy
from ..program import Request
from ..scheduler import Scheduler
from ..transfer import HostTier, Transfer
from ..windows import Window
from .machines import Machine

STRIDE = 64
"""Steps taken at once at most."""
IDLE_S = 0.1
"""Seconds after which an idle loop asks again whether somebody may start."""
Event = Callable[[float], object]


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


class Clock:
    """Events of a run, in the order of their time, and of their making if that is equal."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Event]] = []
        self._number = 0

    @property
    def next_s(self) -> float:
        """Time of the next event; infinity: there is none."""
        return self._events[0][0] if self._events else math.inf

    def at(self, when: float, event: Event) -> None:
        """Let ``event(when)`` happen."""
        self._number += 1
        heapq.heappush(self._events, (when, self._number, event))

    def happen(self) -> None:
        """Let the next event happen."""
        when, _, event = heapq.heappop(self._events)
        event(when)


class SimulatedEngine:
    """A scheduler and the loop that drives it, which does what is due at ``next_s``.

    Args:
        config: sizes of the scheduler.
        policy: of the scheduler.
        machine: that it pretends to run on.
        clock: that it shares with everything else in the run.
        ended: called with every request that has ended, and the time.
        first_token: the same of every request that has got its first token.
        stride: steps taken at once at most. What other engines cause meanwhile is noticed only after them.
        record_plans: keep every plan.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        machine: Machine,
        clock: Clock,
        ended: Callable[[Request, float], None],
        *,
        first_token: Callable[[Request, float], None] | None = None,
        stride: int = STRIDE,
        record_plans: bool = False,
    ):
        self.scheduler = Scheduler(config, policy)
        self.next_s = math.inf
        """Time at which the loop goes on; infinity: it waits for an event."""
        self.now = 0.0
        """Time of its last turn."""
        self.steps = 0
        self.scheduler_s = 0.0
        """Real seconds spent in ``plan`` and ``commit``."""
        self.plans: list[tuple[float, tuple[tuple[int, int, int], ...]]] | None = [] if record_plans else None
        self._machine, self._clock, self._ended, self._stride = machine, clock, ended, stride
        self._first_token = first_token
        self._inbox: list[tuple[float, Event]] = []
        self._link = [0.0, 0.0]  # when each direction is free
        self._running: _Flight | None = None
        self._behind: _Flight | None = None  # dispatched while that one runs
        self._committing = False  # whether the next thing to do is to commit it

    @property
    def due(self) -> int:
        """Events that it will take at its next turn."""
        return len(self._inbox)

    def deliver(self, when: float, event: Event) -> None:
        """Let ``event(when)`` happen at the loop's next turn."""
        self._inbox.append((when, event))
        if self._running is None:
            self.next_s = min(self.next_s, when)

    def go_on(self) -> None:
        """Do what is due: begin a turn, or commit the step in flight."""
        if self._committing:
            self._commit(self.next_s)
        else:
            self._turn(self.next_s)

    def _turn(self, now: float) -> None:
        """Take events, plan, and dispatch the step behind the one in flight."""
        self.now = now
        inbox, self._inbox = self._inbox, []
        for when, event in inbox:
            event(when)
        began = time.perf_counter()
        plan = self.scheduler.plan(now)
        self.scheduler_s += time.perf_counter() - began
        for transfer in self.scheduler.take_transfers()[0]:
            self._start(transfer, now)
        self._behind = None if plan is None else self._launch(plan, now)
        if self._running is not None:
            self.next_s, self._committing = self._running.end, True
        elif self._behind is not None:
            self._follow(now)
        else:
            self.next_s = now + IDLE_S if self.scheduler.stats().waiting else math.inf

    def _commit(self, now: float) -> None:
        """Commit the step in flight, which ends now."""
        running, self._committing = self._running, False
        assert running is not None
        plan = running.plan
        began = time.perf_counter()
        for _ in range(running.times - 1):  # nothing can end before the last
            self.scheduler.commit(plan, [request.num_tokens for request in plan.requests[: plan.samples]], now)
        # A sampled token is its position, as in the prompts: so the next prompt repeats it.
        tokens = [request.num_tokens for request in plan.requests[: plan.samples]]
        requests = self.scheduler.commit(plan, tokens, now)[0]
        for request in requests:
            if self._first_token is not None and len(request.output) == 1:
                self._first_token(request, now)
            if request.finish_reason is not None:
                self._ended(request, now)
        self.scheduler_s += time.perf_counter() - began
        self._follow(now)

    def _follow(self, now: float) -> None:
        """Let the step that was dispatched last be the one in flight."""
        self._running, self._behind = self._behind, None
        self.next_s = now if self._running is None else max(now, self._running.last)

    def _launch(self, plan: Plan, now: float) -> _Flight:
        """Dispatch a step, which starts when the one in flight has ended."""
        if self.plans is not None:
            rows = zip((s.number for s in plan.requests), plan.starts.tolist(), plan.counts.tolist())
            self.plans.append((now, tuple(rows)))
        start = now if self._running is None else max(now, self._running.end)
        machine = self._machine
        step_s, growth = machine.step_s(plan), machine.step_s(plan, 1) - machine.step_s(plan)
        self.scheduler.observe(plan, step_s)
        quiet = (self._clock.next_s - start) / step_s
        most = min(int(min(self._stride, 1 + quiet)), machine.even_steps(plan))
        times = self.scheduler.extend(plan, most) if quiet > 1 else 1
        last_s = step_s + growth * (times - 1)
        end = start + times * (step_s + last_s) / 2
        self.steps += times
        return _Flight(plan, times, end - last_s, end)

    def _start(self, transfer: Transfer, now: float) -> None:
        """Begin a transfer, which waits for those of its direction before it."""
        way, size = 0 if transfer.to_host else 1, self.scheduler.config.page_size
        tokens, in_windows = (len(ids) * size for ids in (transfer.pages, transfer.windows))
        self._link[way] = max(self._link[way], now) + self._machine.transfer_s(tokens, in_windows)
        ended = partial(self.scheduler.transferred, transfer)
        self._clock.at(self._link[way] + self._machine.lag_s, lambda when: self.deliver(when, ended))


@dataclass(frozen=True, slots=True)
class _Flight:
    """A dispatched step, or several equal ones."""

    plan: Plan
    times: int
    last: float
    """Time at which the last of them starts, and the next can be planned."""
    end: float
