"""Residency strategies of other systems, each with its source."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence

from .prediction import Predictor
from .program import Program, Request
from .strategy import KEEP, Decision, Strategy
from .wait import DIFFERS, HOST, RECOMPUTED


class MinWaste(Strategy):
    """``infercept`` (arXiv 2402.01869): evict by least waste.

    Keeping the KV of a program in a tool wait wastes ``T * C`` token-seconds, T estimated as the time already waited;
    dropping it wastes the time to compute it again, for itself and for everybody who runs. Those whose keeping wastes
    most beyond that are evicted first: to the host where there is a tier (the paper's swap, whose budget is what hides
    behind a step; ours is the staging buffer), else for good. KV is evicted on demand only, which dominates evicting it
    early.
    """

    uses_host = True

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        return Decision(KEEP, "until its pages are needed")

    def order(self, programs: Iterable[Program], now: float) -> Iterable[Program]:
        def excess(program: Program) -> float:
            again_s = self.predict.costs.prefill_s(program.kept)
            keep = (now - program.wait_began) * program.kept
            return keep - again_s * (program.kept + self.running_tokens)

        return sorted(programs, key=lambda p: (-excess(p), p.number))


class CacheTTL(Strategy):
    """``cachettl`` (arXiv 2511.02230, first called Continuum; as of its version 7): KV pinned for a time to live.

    ``tau* = argmax_tau P_f(tau) * (T_q * eta + reload) - tau`` over the observed durations of the tool and 0, where P_f
    is their empirical distribution, T_q the mean queueing delay of programs that had lost their place on the device,
    eta whether progress predicts completion, and reload the time to bring the KV back from the host or to compute it
    again, whichever is less. With fewer than ``KNOWN`` waits known in all, the time to live is that of tools
    exponential with mean 1 s and eta 1; with fewer than that of a tool, all tools' distribution. A pin ends with its
    time to live, but not while the program's next request is queued. Where memory is needed the pinned program that
    arrived last loses its pin (the paper's deadlock guard).
    """

    uses_host = True
    KNOWN = 100
    """The paper's number."""

    def __init__(self, predictor: Predictor):
        super().__init__(predictor)
        self._until: dict[Program, float] = {}
        self._queue_s = 0.0  # mean queueing delay of those who had lost their place
        self._delays = 0

    def pinned(self, program: Program, now: float) -> bool:
        return bool(program.pages) and self._until.get(program, -1.0) >= now

    def returned(self, program: Program, now: float) -> None:
        if self.pinned(program, now):
            self._until[program] = math.inf

    def started(self, request: Request, now: float) -> None:
        super().started(request, now)
        self._until.pop(request.program, None)
        resumed = request.resumed
        if request.preemptions == 0 and resumed.source in (HOST, RECOMPUTED) and resumed.why != DIFFERS:
            self._delays += 1
            self._queue_s += (now - request.queued - self._queue_s) / min(self._delays, 100)

    def order(self, programs: Iterable[Program], now: float) -> Iterable[Program]:
        free: list[Program] = []
        pinned: list[Program] = []
        for program in programs:
            (pinned if self.pinned(program, now) else free).append(program)
        pinned.sort(key=lambda p: -p.arrival)
        return [*free, *pinned]

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        waits = self.predict.waits.of(program)
        reload_s = self.predict.costs.prefill_s(program.last.num_tokens if program.last else program.kept)
        if self.host_tier:
            reload_s = min(reload_s, self.predict.transfers.seconds(len(program.pages)))
        if len(waits) >= self.KNOWN:
            tau = time_to_live(waits.values, self._queue_s * max(0.0, self.predict.eta()) + reload_s)
        else:
            benefit = self._queue_s + reload_s
            tau = math.log(benefit) if benefit > 1 else 0.0
        self._until[program] = program.wait_began + tau
        return Decision(KEEP, "time to live")

    def forgotten(self, program: Program) -> None:
        self._until.pop(program, None)


def time_to_live(durations: Sequence[float], benefit_s: float) -> float:
    """``argmax P(tau) * benefit - tau`` over ``durations``, which rise, and 0."""
    best, best_tau = 0.0, 0.0
    step = max(1, len(durations) // 128)
    for i in range(step - 1, len(durations), step):
        value = bisect_right(durations, durations[i]) / len(durations) * benefit_s - durations[i]
        if value > best:
            best, best_tau = value, durations[i]
    return best_tau


class Cycles:
    """The last turns of programs, each with the seconds that its request ran, and that its tools took."""

    KEPT = 5
    """MORI's number."""

    def __init__(self) -> None:
        self._of: dict[Program, deque[tuple[float, float]]] = {}

    def add(self, program: Program, now: float) -> None:
        """A program that waited has got its next request."""
        self._of.setdefault(program, deque(maxlen=self.KEPT)).append(_cycle(program, now))

    def idleness(self, program: Program, now: float, *, waits: bool) -> float:
        """Share of tool waits in a program's last turns, from 0 (busy) to 1.

        The turn under way is included if the program ``waits`` for a tool.
        """
        cycles = [*self._of.get(program, ())]
        if waits:
            cycles = [*cycles, _cycle(program, now)][-self.KEPT :]
        ran, waited = sum(ran for ran, _ in cycles), sum(waited for _, waited in cycles)
        return waited / max(ran + waited, 1e-9)

    def forget(self, program: Program) -> None:
        self._of.pop(program, None)


def _cycle(program: Program, now: float) -> tuple[float, float]:
    """Seconds that a program's last request ran, since it last got a slot, and that its wait has taken by now."""
    ran = program.wait_began - program.last.started if program.last is not None else 0.0
    return ran, now - program.wait_began


class Idleness(Strategy):
    """``mori`` (arXiv 2606.00866): the busiest programs on the device, the idlest on the host.

    A program's idleness is the share of its tool waits in the time of its last five turns, the wait under way included
    and the time in the queue left out. Where memory is needed the idlest is evicted first: of those that wait for their
    tools, then of those whose next request is queued. So the border between the tiers lies where the device is full.
    The paper moves programs every 5 s; here they move when somebody needs the memory. Its text was at hand only
    second-hand.
    """

    uses_host = True

    def __init__(self, predictor: Predictor):
        super().__init__(predictor)
        self._cycles = Cycles()
        self._queued: set[Program] = set()

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        self._queued.discard(program)
        return Decision(KEEP, "until its pages are needed")

    def returned(self, program: Program, now: float) -> None:
        self._cycles.add(program, now)
        self._queued.add(program)

    def order(self, programs: Iterable[Program], now: float) -> Iterable[Program]:
        def place(program: Program) -> tuple[bool, float, int]:
            queued = program in self._queued
            return queued, -self._cycles.idleness(program, now, waits=not queued), program.number

        return sorted(programs, key=place)

    def forgotten(self, program: Program) -> None:
        self._cycles.forget(program)
        self._queued.discard(program)
