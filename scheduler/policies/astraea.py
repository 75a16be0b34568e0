"""Astraea's idea, highest response ratio next over stateful programs, at the level of iterations and memory.

Kept from arXiv 2512.14142: the unit is the program with its history; the response ratio weighs the wait that it has
accumulated over all its requests; short remaining work goes first, and waiting makes everybody rise. What differs, and
why (each is a row of the ablation table, `python scripts/bench_jct.py --policies=fcfs,ablation`):

* Requests start as soon as memory allows, not in batches that run to completion.
* The scarce resource is memory, so a program's size is memory times time: the tokens of its request (those it would
  newly need pages for count in full, those it still has pages for by half) times its expected remaining turns. What
  a prefill costs however short it is counts as further tokens.
* Remaining turns are a Gittins index over the hazard of ending at each turn, learned online from all programs, those
  still live included. It blends what discrete levels and eta (does progress predict completion?) approximate: a
  fixed number of turns raises programs as they progress, a geometric one leaves them, a heavy tail demotes them.
  Hazards are learned apart for programs that output little, middling and much per request, and within these follow the
  output by a power that is learned, too.
* The ratio is ``(W + R + c) / size ** 1.4``: W the waits and R the running time of the program over all its requests,
  tool waits left out; c half of a typical program's running time. It grows without bound, so nobody starves, and a
  program whose W exceeds ``PATIENCE`` times a typical running time jumps the queue, the longest wait first.
* Where the first in order does not fit, smaller ones are backfilled, up to four times. Without backfill large contexts
  leave memory idle; without the bound they would wait for each other. Where rows share little of a step's time, idle
  memory costs nothing, and whoever is backfilled only delays the others: there is no backfill.
* Aging jumps the queue but never preempts: preempting by priority was measured to cost a factor.
* Without a host tier a dropped context costs its whole prefill, so a gate holds new programs back while those that
  return lose their KV and queue for it; with a host tier such a gate only idles memory, and there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..contexts import Contexts
from ..policy import CLASS, Policy, Pressure
from ..prediction import FEW_TOKENS, Predictor
from ..program import Program, Request

PATIENCE = 20.0
"""Typical running times that a program waits in all before it jumps the queue. Swept over 7, 11 and 20 when running
counted as waiting: less patience buys P99 and costs the mean (benchmarks/RESULTS.md, "Scheduling")."""

BACKFILL_FROM = 0.25
"""Share of the time of a full pool's step that its rows share, from which there is backfill. On simulated machines that
differ in nothing else it costs the mean at 0.2 and gains at 0.35."""


@dataclass(frozen=True)
class Terms:
    """The terms of the score, so that studies can leave one out: what each is worth is in benchmarks/RESULTS.md."""

    exponent: float = 1.4
    """Exponent of the size, against the response. Swept: larger ones gain nothing."""
    resident: float = 0.5
    """Discount of a token whose page the program still holds: a guess, worth keeping without a host tier."""
    typical: float = 0.5
    """Share of a typical program's running time in the response; its size does not matter."""
    turns: bool = True
    """Weigh remaining turns, by the hazard of ending."""
    kinds: bool = True
    """Learn hazards apart for programs that output little, middling and much per request, and how they follow it."""
    memory: bool = True
    """Weigh the pages that a request needs."""
    wait: bool = True
    """Weigh accumulated wait and running time."""
    backfill: int = 8
    """Later requests that are tried if the first in order does not fit."""
    costs: bool = True
    """Weigh what steps cost on this machine: the fixed cost of a prefill, and whether backfill pays."""
    gate: bool = True
    """Hold new programs back, where there is no host tier."""


class Astraea(Policy):
    columns = 3
    max_skips = 4
    """A bound at all keeps P99; how large it is, is a guess."""

    def __init__(self, predictor: Predictor, terms: Terms | None = None):
        super().__init__(predictor)
        self._terms = terms or Terms()
        self.backfill = self._terms.backfill
        self._gate = Gate()
        self._oldest = math.inf  # nobody has waited since before
        self._pool = math.inf  # its tokens, which the first scores tell

    def features(self, request: Request) -> Sequence[float]:
        program, terms = request.program, self._terms
        size = 1.0
        if terms.turns:
            size *= self.predict.turns_index(program) if terms.kinds else self.predict.hazards.index(program.job.turns)
        if terms.memory:
            held = min(request.reusable, len(program.pages) * request.page_size)
            size *= request.num_tokens - terms.resident * held + self._prefill()
        since = request.queued - program.job.waited_s
        self._oldest = min(self._oldest, since)
        return since, since - program.job.ran_s, size**-terms.exponent

    def _prefill(self) -> float:
        """Tokens as which the fixed cost of a prefill counts."""
        if not self._terms.costs:
            return 0.0
        return self.predict.costs.prefill_in_context(self.predict.outputs.mean(FEW_TOKENS), self._pool)

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        self._pool = pressure.pages * pressure.page_size
        if self._terms.costs:
            pays = self.predict.costs.batching_saves(self._pool) >= BACKFILL_FROM
            self.max_skips = type(self).max_skips if pays else 0
        since, began, weight = features.T
        typical = self.predict.job_s()
        head_start = self._terms.typical * typical
        scores: np.ndarray = began - (now + head_start) if self._terms.wait else np.full(len(began), -head_start)
        scores *= weight
        if now - self._oldest > PATIENCE * typical:  # rarely, so not everybody is looked at each time
            wait, self._oldest = now - since, float(since.min())
            scores = np.where(wait > PATIENCE * typical, -CLASS - wait, scores)
        return scores

    def rank(self, request: Request) -> tuple[float, ...]:
        return (request.program.job.arrival, request.number)

    def admits(self, request: Request, now: float, pressure: Pressure) -> bool:
        return pressure.host_tier or not self._terms.gate or self._gate.admits(request, now, pressure)

    def admitted(self, request: Request, now: float) -> None:
        lost = max(0, request.matched - request.reusable - 1)
        self._gate.recomputes(self.predict.costs.per_token_s * lost, now)
        self._gate.runs(request, now)

    def ended(self, request: Request, now: float) -> None:
        self._gate.waits(request, now)

    def forgotten(self, program: Program) -> None:
        self._gate.forget(program)


class Gate:
    """Holds new programs back while the machine spends much of its time computing lost KV again.

    It shuts when that share of the time exceeds ``SHUT``, and opens below ``OPEN``. While shut, a new program starts
    only if the contexts of those that have started fit into the pool with it; those of programs in a tool wait fade.
    Every operation is O(1).
    """

    SHUT, OPEN = 0.25, 0.05
    """Guesses, far apart so that the gate does not flutter."""
    WINDOW_S = 60.0
    """Seconds over which the share fades: a guess."""

    def __init__(self) -> None:
        self.shut = False
        self._again_s, self._at = 0.0, 0.0
        self._contexts = Contexts()

    def recomputes(self, seconds: float, now: float) -> None:
        """A request starts that spends ``seconds`` on computing lost KV again."""
        self._fade(now)
        self._again_s += seconds

    def admits(self, request: Request, now: float, pressure: Pressure) -> bool:
        """Whether a waiting request may start."""
        self._fade(now)
        share = self._again_s / self.WINDOW_S
        self.shut = share > (self.OPEN if self.shut else self.SHUT)
        contexts = self._contexts
        if not self.shut or request.program in contexts or not contexts.any_active:
            return True
        return contexts.active + contexts.faded(now) + request.num_tokens <= pressure.pages * pressure.page_size

    def runs(self, request: Request, now: float) -> None:
        """A request has started."""
        self._contexts.works(request.program, request.num_tokens, now)

    def waits(self, request: Request, now: float) -> None:
        """A request has ended, and its program waits for a tool."""
        self._contexts.waits(request.program, request.num_tokens, now)

    def forget(self, program: Program) -> None:
        """Count a program no more, neither as running nor as waiting for a tool."""
        self._contexts.forget(program)

    def _fade(self, now: float) -> None:
        self._again_s *= math.exp(-(now - self._at) / self.WINDOW_S)
        self._at = now
