"""Predictions that policies may use, learned online.

No decision waits for a prediction; with nothing learned yet the answers are rough and positive.
"""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict, deque

import numpy as np

from .costs import StepCosts, StepFit, TransferFit
from .histogram import Histogram
from .program import Program, Request

WINDOW = 1024
"""Recent observations that a distribution keeps: a guess."""
ENOUGH = 30
"""Observations below which a narrower distribution gives way to a wider one: the usual rule of thumb."""
FEW_TOKENS, FEW_TURNS, FEW_SECONDS = 100.0, 8.0, 1.0
"""Output tokens per request, requests per program and seconds per tool wait, before anything is known: guesses, which
only order the first few programs."""


WAIT_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Bounds of tool waits that are counted."""


class ToolWaits:
    """Times that programs have waited for their tools, and errors of their predictions."""

    def __init__(self) -> None:
        self.seconds = Histogram(WAIT_S)
        self.errors = Histogram(WAIT_S)
        """Between the seconds predicted and those that a wait took, whichever was more."""

    def add(self, took_s: float, predicted_s: float) -> None:
        """Count a wait."""
        self.seconds.add(took_s)
        self.errors.add(abs(took_s - predicted_s))


class Distribution:
    """The last ``WINDOW`` observations of a quantity."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._sum = 0.0

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, value: float) -> None:
        self._recent.append(value)
        bisect.insort(self._sorted, value)
        self._sum += value
        if len(self._recent) > WINDOW:
            oldest = self._recent.popleft()
            del self._sorted[bisect.bisect_left(self._sorted, oldest)]
            self._sum -= oldest

    @property
    def values(self) -> list[float]:
        """The observations in rising order."""
        return self._sorted

    def mean(self, default: float) -> float:
        return self._sum / len(self._recent) if self._recent else default

    def quantile(self, q: float, default: float) -> float:
        return self._sorted[min(len(self._sorted) - 1, int(q * len(self._sorted)))] if self._sorted else default

    def mean_beyond(self, elapsed: float, default: float) -> float:
        """Predict the remainder of a quantity that has reached ``elapsed``.

        It is at least as much again if nothing seen went further.
        """
        beyond = self._sorted[bisect.bisect_right(self._sorted, elapsed) :]
        return sum(beyond) / len(beyond) - elapsed if beyond else max(elapsed, default)

    def median_beyond(self, elapsed: float, default: float) -> float:
        """Median remainder of a quantity that has reached ``elapsed``; the same if nothing seen went further."""
        beyond = self._sorted[bisect.bisect_right(self._sorted, elapsed) :]
        return beyond[len(beyond) // 2] - elapsed if beyond else max(elapsed, default)


class TurnHazards:
    """Learns the chance that a program ends at its k-th request, given that it gets there (Kaplan and Meier 1958).

    Programs that still live count among those at risk, so that the estimate is not drawn to short programs. Hazards
    are smoothed over neighbouring turns and towards their overall mean; those of one kind of programs towards those of
    all. Kind 0 is all programs, and stands for those of which nothing is known.
    """

    KINDS = 4
    LONGEST = 256
    """Turns that are told apart; later ones count as the last of these."""
    HORIZON = 64
    """Turns that the Gittins index looks ahead: beyond it the chance to be alive is small on every workload here."""
    EVERY = 64
    """Requests after which the tables are made anew, which takes about a millisecond."""
    PRIOR = 6.0
    """Weight of the overall mean, in observations: a guess, small against what a busy server sees in a minute."""
    KIN = 20.0
    """Weight of all programs in the estimate for a kind, in observations: a guess; benchmarks/RESULTS.md says when
    kinds gain."""
    WIDTH = 2.0
    """Scale of the smoothing, in turns: a guess."""
    FEWEST_ENDS, FEWEST_TURNS = 1.0, 8.0
    """Counted beside what was seen, so that programs last eight turns before anything is known: a guess."""

    def __init__(self) -> None:
        n, shape = self.LONGEST, (self.KINDS, self.LONGEST)
        self._risk, self._ends = np.zeros(shape), np.zeros(shape)
        self._seen = 0
        turns = np.arange(n)
        self._kernel = np.exp(-np.abs(turns[:, None] - turns) / self.WIDTH)
        self._remaining, self._index = np.ones(shape), np.ones(shape)
        self._make_tables()

    def observe(self, turn: int, last: bool, kind: int = 0) -> None:
        """Learn that request number ``turn``, from 0, of a program of that kind has ended, and was its last or not."""
        at = min(turn, self.LONGEST - 1)
        for row in {0, kind}:
            self._risk[row, at] += 1
            self._ends[row, at] += last
        self._seen += 1
        if self._seen % self.EVERY == 0:
            self._make_tables()

    def remaining(self, turn: int, kind: int = 0) -> float:
        """Expected requests from number ``turn`` on, itself included."""
        return float(self._remaining[kind, min(turn, self.LONGEST - 1)])

    def index(self, turn: int, kind: int = 0) -> float:
        """Inverse Gittins index: the least expected requests per chance to end, over all horizons (Gittins 1979)."""
        return float(self._index[kind, min(turn, self.LONGEST - 1)])

    def _make_tables(self) -> None:
        n = self.LONGEST
        mean = (self._ends[0].sum() + self.FEWEST_ENDS) / (self._risk[0].sum() + self.FEWEST_TURNS)
        ends, risk = self._ends @ self._kernel, self._risk @ self._kernel
        everybody = (ends[0] + self.PRIOR * mean) / (risk[0] + self.PRIOR)
        hazard = (ends + self.KIN * everybody) / (risk + self.KIN)
        hazard[0] = everybody
        hazard = np.clip(hazard, 1e-3, 1.0)
        after: float | np.ndarray = 1 / mean
        for turn in range(n - 1, -1, -1):
            self._remaining[:, turn] = after = 1 + (1 - hazard[:, turn]) * after
        padded = np.concatenate([hazard, np.full((self.KINDS, self.HORIZON), mean)], axis=1)
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.HORIZON, axis=1)[:, :n]
        alive = np.cumprod(1 - windows, axis=2)  # after each turn of the horizon
        run = 1 + np.concatenate([np.zeros((self.KINDS, n, 1)), np.cumsum(alive[..., :-1], axis=2)], axis=2)
        self._index = 1 / ((1 - alive) / run).max(axis=2)


class Predictor:
    """Learns from what has ended: output lengths, tool times per tool, turns per program, seconds per step."""

    def __init__(self) -> None:
        self.steps = StepFit()
        self.transfers = TransferFit()
        self.outputs = Distribution()
        """Output tokens per request."""
        self.service = Distribution()
        """Tokens computed per request, as the mean of its program so far."""
        self.tool_waits = Distribution()
        """Seconds per tool wait, of all tools."""
        self.waits = ToolWaits()
        self.tools: OrderedDict[str, Distribution] = OrderedDict()
        """The same by tool: the ``WINDOW`` named last, since names come from clients. The oldest is first."""
        self.talk = Distribution()
        """Output tokens per request, as the mean of its program so far."""
        self.turns = Distribution()
        """Requests per program."""
        self.hazards = TurnHazards()
        self._progress = [0.0] * 6  # decaying sums over the turns of ended programs: 1, k, r, k², r², k r (see eta)

    # -- questions ---------------------------------------------------------------------------------------------

    @property
    def costs(self) -> StepCosts:
        """The latest fit of step costs."""
        return self.steps.costs

    def output_tokens(self, request: Request) -> float:
        """Predict the tokens that a request will still output.

        This is the mean of its program, drawn to that of all as if two more had output that.
        """
        program = request.program
        prior = self.outputs.mean(FEW_TOKENS)
        own = (program.output_tokens + 2 * prior) / (program.turns + 2)
        return max(own - len(request.output), 0.1 * own)

    def tool_s(self, program: Program, elapsed_s: float = 0.0) -> float:
        """Seconds that a program's present or next tool wait goes on after ``elapsed_s``."""
        return self.tool_times(program.tool).mean_beyond(elapsed_s, FEW_SECONDS)

    def returns_in(self, program: Program, elapsed_s: float) -> float:
        """Seconds until a program's tool wait is as likely over as not."""
        return self.tool_times(program.tool).median_beyond(elapsed_s, FEW_SECONDS)

    def tool_times(self, tool: str | None) -> Distribution:
        """Seconds per wait for that tool if enough is known of it, or else for all tools."""
        own = self.tools.get(tool) if tool is not None else None
        return own if own is not None and len(own) >= ENOUGH else self.tool_waits

    def remaining_turns(self, program: Program) -> float:
        """Requests that a program will still run, the present or next one included."""
        return self.hazards.remaining(program.turns, self._kind(program.turns, program.output_tokens))

    def turns_index(self, program: Program) -> float:
        """Expected requests per chance that a program ends; see :meth:`TurnHazards.index`."""
        return self.hazards.index(program.turns, self._kind(program.turns, program.output_tokens))

    def _kind(self, turns: int, outputs: int) -> int:
        """Tell the kind of a program by its hazard of ending.

        It is the third in which its mean output per request lies; 0 while that is unknown.
        """
        if turns == 0 or len(self.talk) < ENOUGH:
            return 0
        return 1 + sum(outputs / turns > self.talk.quantile(q, 0.0) for q in (1 / 3, 2 / 3))

    def program_s(self) -> float:
        """Seconds that a typical program runs in all."""
        return self.steps.decode_s(self.outputs.mean(FEW_TOKENS) * self.turns.mean(FEW_TURNS))

    def remaining_s(self, request: Request) -> float:
        """Seconds of model time that a request and those that its program runs after it would take alone."""
        own = self.steps.decode_s(self.output_tokens(request))
        later = self.steps.decode_s(self.outputs.mean(FEW_TOKENS))
        fresh = self.costs.prefill_s(max(1, request.num_tokens - request.reusable))
        return fresh + own + (self.remaining_turns(request.program) - 1) * later

    def request_s(self, request: Request) -> float:
        """Seconds of model time that a request would take alone."""
        fresh = self.costs.prefill_s(max(1, request.num_tokens - request.reusable))
        return fresh + self.steps.decode_s(self.output_tokens(request))

    def eta(self) -> float:
        """Say how far progress predicts completion (Continuum, arXiv 2511.02230).

        This is ``-Corr(k, r)`` of the turns k that ended programs had behind them and the r ahead; 1 for a fixed number
        of turns, 0 for a geometric one, below 0 for heavier tails.
        """
        n, k, r, kk, rr, kr = self._progress
        if n < ENOUGH:
            return 1.0
        variance = (kk / n - (k / n) ** 2) * (rr / n - (r / n) ** 2)
        return 1.0 if variance <= 1e-12 else -(kr / n - k * r / n**2) / math.sqrt(variance)

    # -- events ------------------------------------------------------------------------------------------------

    def ended(self, request: Request) -> None:
        """A request has ended."""
        if request.finish_reason in ("stop", "length"):
            program = request.program
            before = program.turns - 1, program.output_tokens - len(request.output)
            self.hazards.observe(before[0], request.final, self._kind(*before))
            self.outputs.add(len(request.output))
            self.talk.add(program.output_tokens / program.turns)
            self.service.add(program.service / program.turns)

    def returned(self, program: Program) -> None:
        """A tool wait has ended."""
        self.waits.add(program.wait_s, self.tool_s(program))
        self.tool_waits.add(program.wait_s)
        if program.tool is not None:
            own = self.tools.pop(program.tool, None) or Distribution()
            own.add(program.wait_s)
            self.tools[program.tool] = own
            if len(self.tools) > WINDOW:
                self.tools.popitem(last=False)

    def forgotten(self, program: Program) -> None:
        """A program has ended."""
        if program.turns == 0:
            return
        self.turns.add(program.turns)
        n = program.turns
        k, squares = (
            n * (n - 1) / 2,
            (n - 1) * n * (2 * n - 1) / 6,
        )  # sums over turns 0 … n - 1, of which n - k are left
        moments = (n, k, n * n - k, squares, n**3 - 2 * n * k + squares, n * k - squares)
        self._progress = [0.995 * old + new for old, new in zip(self._progress, moments, strict=True)]
