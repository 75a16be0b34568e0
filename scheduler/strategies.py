"""Strategies of the residency manager: what becomes of a program's KV while it does not run.

A strategy decides; :class:`~.residency.Residency` carries out. Retention is best effort: whatever a strategy says,
pages that no running request uses are evicted when somebody needs them, so a wish to keep KV can delay nobody for ever.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .prediction import Predictor
from .program import Program, Request

KEEP, OFFLOAD, DISCARD, EVICT_FIRST = "keep", "offload", "discard", "evict first"


class Decision(NamedTuple):
    """An action for the KV of a program that begins to wait, and the reason."""

    action: str
    """``KEEP``; ``DISCARD`` now; ``OFFLOAD``: copy it ahead of need; ``EVICT_FIRST``: keep it, but evict it before the
    KV of other programs."""
    why: str


class Strategy:
    """Decides what becomes of KV."""

    ahead = (0.0, 0.0)
    """With a host tier: when free and clean pages fall below the first share of the pool, pages are offloaded until
    they reach the second."""
    uses_host = False
    """Pages go to the host tier, if there is one, when they are needed; otherwise they are dropped."""
    evicts_clean = False
    """Pages offloaded ahead of need leave the device at once."""

    def __init__(self, predictor: Predictor):
        self.predict = predictor
        self.running_tokens = 0.0
        """Tokens of context of all running requests."""

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        """Decide for a program that begins to wait for a tool, or that has just named the tool.

        Args:
            program: it.
            slack: share of the pool that is free or clean.
            now: seconds.
        """
        raise NotImplementedError

    def offloads(self, program: Program) -> bool:
        """Whether a program's pages are offloaded when they are needed; if not, they are dropped."""
        return self.uses_host

    def order(self, programs: Iterable[Program], now: float) -> Iterable[Program] | None:
        """Order in which ``programs``, least recently used first, are evicted; None: as they come."""
        return None

    def pinned(self, program: Program, now: float) -> bool:
        """Whether a program's KV is to be kept: a preference, never a guarantee."""
        return False

    def started(self, request: Request, now: float) -> None:
        """A request has got its pages; ``reused`` says how many tokens it need not compute."""
        self.running_tokens += request.num_tokens

    def stopped(self, request: Request) -> None:
        """A request has ended or is preempted."""
        self.running_tokens = max(0.0, self.running_tokens - request.num_tokens)

    def forgotten(self, program: Program) -> None:
        """A program has ended."""


class AlwaysKeep(Strategy):
    """``always-keep``: on the device until somebody needs the pages, then dropped, least recently used first.

    What a prefix cache without a host tier does (vLLM).
    """

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        return Decision(KEEP, "always")


class AlwaysOffload(Strategy):
    """``always-offload``: every program that waits moves to the host at once."""

    ahead = (1.0, 1.0)
    uses_host = True
    evicts_clean = True

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        return Decision(OFFLOAD, "always")


class AlwaysDiscard(Strategy):
    """``always-discard``: every program that waits loses its KV at once and computes it again."""

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        return Decision(DISCARD, "always")


class Adaptive(Strategy):
    """``adaptive``: keep KV while there is room; under pressure decide by cost.

    Without pressure nothing ever moves. With less than ``ahead`` of the pool free or clean, the KV that is idle longest
    is offloaded *and stays on the device*: its pages can then be had at once, and a program that returns before anybody
    needed them has lost nothing. A program whose tool usually takes ``LONG`` times the way to the host and back is
    evicted first. KV is dropped instead where computing it again wastes less memory than restoring it: restoring idles
    the program's own pages, computing again delays everybody who runs (InferCept's waste).
    """

    ahead = (0.30, 0.35)
    """A guess: early enough to copy while steps go on, late enough to do nothing without pressure."""
    uses_host = True
    LONG = 20.0
    """A guess: the decision matters little, since pages are evicted only when they are needed."""

    def waits(self, program: Program, slack: float, now: float) -> Decision:
        if slack > self.ahead[1]:
            return Decision(KEEP, "no pressure")
        if not self.predict.knows_wait(program):
            return Decision(KEEP, "nothing is known of its tool")
        way_s = 2 * self.predict.transfers.seconds(len(program.pages))
        if self.predict.returns_in(program, now - program.wait_began) > self.LONG * way_s:
            return Decision(EVICT_FIRST, "its tool takes long")
        return Decision(KEEP, "it returns soon")

    def offloads(self, program: Program) -> bool:
        back_s = self.predict.transfers.seconds(len(program.pages))
        again_s = self.predict.steps.again_s(program.kept)
        return back_s * program.kept < again_s * (program.kept + self.running_tokens)


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


class TimeToLive(Strategy):
    """``continuum`` (arXiv 2511.02230): KV pinned for a time to live that the tool's history justifies.

    ``tau* = argmax_tau P_f(tau) * (T_q * eta + reload) - tau`` over the observed durations of the tool and 0, where P_f
    is their empirical distribution, T_q the mean queueing delay of programs that had lost their KV, eta whether
    progress predicts completion, and reload the time to compute the KV again. With fewer than ``KNOWN`` waits known in
    all, the time to live is that of tools exponential with mean 1 s and eta 1; with fewer than that of a tool, all
    tools' distribution. Where memory is needed the pinned program that arrived last loses its pin (the paper's
    deadlock guard).
    """

    uses_host = True
    KNOWN = 100
    """The paper's number."""

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
        waits = self.predict.waits.of(program)
        reload_s = self.predict.costs.prefill_s(program.last.num_tokens if program.last else program.kept)
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


STRATEGIES: dict[str, Callable[[Predictor], Strategy]] = {
    "adaptive": Adaptive,
    "always-keep": AlwaysKeep,
    "always-offload": AlwaysOffload,
    "always-discard": AlwaysDiscard,
    "infercept": MinWaste,
    "continuum": TimeToLive,
}
"""Strategies by name."""


def make_strategy(name: str, predictor: Predictor) -> Strategy:
    """Make the strategy of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in STRATEGIES:
        raise ValueError(f"no residency strategy is called {name!r}; there are {', '.join(STRATEGIES)}")
    return STRATEGIES[name](predictor)
