"""What becomes of a program's KV while it does not run: the strategies of the residency manager.

A strategy decides; :class:`~.residency.Residency` carries out. Nothing that it keeps is safe: whatever a strategy says,
pages that no running request uses are taken when somebody needs them, so a wish to keep can delay nobody for ever.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .prediction import ENOUGH, Predictor
from .program import Program, Request

KEEP, OFFLOAD, DISCARD, LAST = "keep", "offload", "discard", "give first"


class Decision(NamedTuple):
    """What to do with the KV of a program that begins to wait, and why."""

    action: str
    """``KEEP``; ``DISCARD`` now; ``OFFLOAD``, by copying ahead of need; or keep, but ``LAST`` to return: first to be
    given up."""
    why: str


class Strategy:
    """``always-keep``: on the device until somebody needs the pages, then lost, least recently used first. What a
    prefix cache without a host tier does (vLLM)."""

    ahead = (0.0, 0.0)
    """Where there is a host tier: when free pages and pages with a host copy fall below the first share of the pool,
    pages are copied until there are as many as the second."""
    hosts = False
    """Pages go to the host tier, if there is one, when they are needed; otherwise they are lost."""
    releases = False
    """What has been copied ahead of need leaves the device at once."""

    def __init__(self, predictor: Predictor):
        self.predict = predictor
        self.batch = 0.0
        """Tokens of context of those who run."""

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        """A program begins to wait for a tool, or has named the tool.

        Args:
            program: it.
            slack: share of the pool that is free or has a host copy.
            now: seconds.
        """
        return Decision(KEEP, "always")

    def moves(self, program: Program) -> bool:
        """Whether a program's pages are worth moving; if not, they are lost when they are needed."""
        return self.hosts

    def order(self, programs: Iterable[Program], now: float) -> Iterable[Program] | None:
        """Whose pages go first, of programs that hold some, least recently used first; None: as they come."""
        return None

    def pinned(self, program: Program, now: float) -> bool:
        """Whether its KV is to be kept; a preference, never a guarantee."""
        return False

    def started(self, request: Request, now: float) -> None:
        """A request has got its pages; ``reused`` says how much it need not compute."""
        self.batch += request.known

    def stopped(self, request: Request) -> None:
        """A request has ended or is preempted."""
        self.batch = max(0.0, self.batch - request.known)

    def forgotten(self, program: Program) -> None:
        """A program has ended."""


class AlwaysOffload(Strategy):
    """Every program that waits moves to the host at once."""

    ahead = (1.0, 1.0)
    hosts = True
    releases = True

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        return Decision(OFFLOAD, "always")


class AlwaysDiscard(Strategy):
    """Every program that waits loses its KV at once and computes it again."""

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        return Decision(DISCARD, "always")


class Adaptive(Strategy):
    """Keep while there is room; under pressure, by cost.

    With less than ``ahead`` of the pool free or copied, the KV that is idle longest is copied to the host *and stays on
    the device*: pages can then be had at once, and a program that returns before anybody needed them has lost nothing.
    A program whose tool usually takes ``LONG`` times its way to the host and back goes before those. Where computing
    KV again wastes less memory than bringing it back, it is dropped instead: bringing back idles the program's own
    pages, computing again those of everybody in the batch (InferCept's waste). No pressure: nothing ever moves.
    """

    ahead = (0.30, 0.35)
    hosts = True
    LONG = 20.0

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        if slack > self.ahead[1]:
            return Decision(KEEP, "no pressure")
        if len(self.predict.tool_times(program.tool)) < ENOUGH:
            return Decision(KEEP, "nothing is known of its tool")
        way_s = 2 * self.predict.transfers.seconds(len(program.pages))
        if self.predict.returns_in(program, now - program.wait_began) > self.LONG * way_s:
            return Decision(LAST, "its tool takes long")
        return Decision(KEEP, "it returns soon")

    def moves(self, program: Program) -> bool:
        back_s = self.predict.transfers.seconds(len(program.pages))
        again_s = self.predict.costs.per_token * program.kept  # its next request has something to prefill anyway
        return back_s * program.kept < again_s * (program.kept + self.batch)


class MinWaste(Strategy):
    """``infercept`` (arXiv 2402.01869): KV given up by least waste.

    Keeping the KV of a program in a tool wait wastes ``T * C`` token-seconds, T estimated as the time already waited;
    dropping it wastes the time to compute it again, for itself and for everybody in the batch. Those whose keeping
    wastes most beyond that lose it first: to the host where there is a tier (the paper's swap, whose budget is what
    hides behind a step; ours is the staging buffer), else for good. KV is given up on demand only, which dominates
    giving it up early.
    """

    hosts = True

    def order(self, programs: Iterable[Program], now: float) -> Iterable[Program]:
        def excess(program: Program) -> float:
            again_s = self.predict.costs.prefill_s(program.kept)
            keep = (now - program.wait_began) * program.kept
            return keep - again_s * (program.kept + self.batch)

        return sorted(programs, key=lambda p: (-excess(p), p.number))


class TimeToLive(Strategy):
    """``continuum`` (arXiv 2511.02230): KV pinned for a time to live that the tool's history justifies.

    ``tau* = argmax_tau P_f(tau) * (T_q * eta + reload) - tau`` over the observed durations of the tool and 0, where P_f
    is their empirical distribution, T_q the mean queueing delay of programs that had lost their KV, eta whether
    progress predicts completion, and reload the time to compute the KV again. With fewer than ``KNOWN`` waits known in
    all, the time to live is that of tools exponential with mean 1 s and eta 1; with fewer than that of a tool, all
    tools' distribution. Where memory is needed the pinned program that arrived last loses its pin (the paper's
    deadlock guard).
    """

    hosts = True
    KNOWN = 100

    def __init__(self, predictor: Predictor):
        super().__init__(predictor)
        self._until: dict[Program, float] = {}
        self._queue_s = 0.0  # mean queueing delay of those who had lost their KV
        self._delays = 0

    def pinned(self, program: Program, now: float) -> bool:
        return self._until.get(program, -1.0) >= now

    def started(self, request: Request, now: float) -> None:
        super().started(request, now)
        if request.reused < request.matched - 1 and request.preemptions == 0:
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
        waits = self.predict.tool_times(program.tool)
        reload_s = self.predict.costs.prefill_s(program.last.known if program.last else program.kept)
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
    """``argmax P(tau) * benefit - tau`` over ``durations`` (rising) and 0."""
    best, best_tau = 0.0, 0.0
    step = max(1, len(durations) // 128)
    for i in range(step - 1, len(durations), step):
        value = bisect_right(durations, durations[i]) / len(durations) * benefit_s - durations[i]
        if value > best:
            best, best_tau = value, durations[i]
    return best_tau


STRATEGIES: dict[str, Callable[[Predictor], Strategy]] = {
    "adaptive": Adaptive,
    "always-keep": Strategy,
    "always-offload": AlwaysOffload,
    "always-discard": AlwaysDiscard,
    "infercept": MinWaste,
    "continuum": TimeToLive,
}
"""By name."""


def make_strategy(name: str, predictor: Predictor) -> Strategy:
    """The strategy of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in STRATEGIES:
        raise ValueError(f"no residency strategy is called {name!r}; there are {', '.join(STRATEGIES)}")
    return STRATEGIES[name](predictor)
