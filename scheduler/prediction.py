"""What policies may know about the future, learned online.

No decision waits for a prediction; with nothing learned yet the answers are rough and positive.
"""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict, deque

import numpy as np

from .plan import Plan
from .program import Program, Request

WINDOW = 1024
"""Recent observations that a distribution keeps."""
ENOUGH = 30
"""Observations below which a narrower distribution gives way to a wider one."""


class StepCosts:
    """Seconds of a step, fitted to the steps as they come: ``base``, ``per_prefill`` more if any row prefills,
    ``per_token`` new token and ``per_context`` token attended to.

    Least squares over a sliding exponential window, solved again every few steps.
    """

    EVERY = 64

    def __init__(self) -> None:
        self.forget = 0.998
        """Weight of a step against the one after it; 1: all count alike."""
        self.base, self.per_prefill, self.per_token, self.per_context = 5e-3, 0.0, 5e-5, 5e-8
        self.steps = 0
        self.mean_step_s = self.base
        """Of recent steps: how long one decoded token takes at the present load."""
        self._scale = np.array([1.0, 1.0, 1e-2, 1e-5])  # so that the columns are of one size
        self._recent: list[tuple[float, ...]] = []  # steps that are not in the sums yet
        self._gram = np.zeros((4, 4))
        self._right = np.zeros(4)

    def observe(self, plan: Plan, seconds: float) -> None:
        """A step took so long."""
        self._recent.append((1.0, plan.tokens > len(plan.requests), plan.tokens, plan.context, seconds))
        self.steps += 1
        self.mean_step_s += (seconds - self.mean_step_s) / min(self.steps, 50)
        if len(self._recent) == self.EVERY:
            self._fit()

    def _fit(self) -> None:
        steps = np.array(self._recent)
        self._recent.clear()
        rows, weights = self._scale * steps[:, :4], self.forget ** np.arange(self.EVERY - 1, -1, -1)
        self._gram = self.forget**self.EVERY * self._gram + (weights * rows.T) @ rows
        self._right = self.forget**self.EVERY * self._right + (weights * steps[:, 4]) @ rows
        ridge = 1e-6 * np.trace(self._gram) * np.eye(4)
        fitted = np.linalg.solve(self._gram + ridge, self._right) * self._scale
        self.base, self.per_prefill, self.per_token, self.per_context = np.maximum(fitted, 0.0).tolist()

    def prefill_s(self, tokens: int) -> float:
        """Seconds of step time that prefilling ``tokens`` adds."""
        return self.per_prefill + self.per_token * tokens

    def decode_s(self, tokens: float) -> float:
        """Seconds until ``tokens`` more tokens are decoded, at the present load."""
        return self.mean_step_s * tokens


class TransferCosts:
    """Seconds that pages take between device and host: ``latency`` and ``per_page``, by least squares over the
    transfers as they end, in a sliding exponential window."""

    FORGET = 0.98

    def __init__(self) -> None:
        self.latency, self.per_page = 0.0, 1e-4
        self._sums = [0.0] * 5

    def observe(self, pages: int, seconds: float) -> None:
        """A transfer took so long, waiting for others and for the loop to notice included."""
        new = (1.0, pages, seconds, pages * pages, pages * seconds)
        self._sums = [self.FORGET * old + more for old, more in zip(self._sums, new, strict=True)]
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-6 * xx else y / x
        self.per_page = min(max(slope, 0.0), y / x)
        self.latency = (y - self.per_page * x) / n

    def seconds(self, pages: int) -> float:
        """Of a transfer of so many pages."""
        return self.latency + self.per_page * pages


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
        """In rising order."""
        return self._sorted

    def mean(self, default: float) -> float:
        return self._sum / len(self._recent) if self._recent else default

    def quantile(self, q: float, default: float) -> float:
        return self._sorted[min(len(self._sorted) - 1, int(q * len(self._sorted)))] if self._sorted else default

    def mean_beyond(self, elapsed: float, default: float) -> float:
        """Expected remainder of a quantity that has reached ``elapsed``."""
        beyond = self._sorted[bisect.bisect_right(self._sorted, elapsed) :]
        return sum(beyond) / len(beyond) - elapsed if beyond else max(elapsed, default)

    def median_beyond(self, elapsed: float, default: float) -> float:
        """Median remainder of a quantity that has reached ``elapsed``."""
        beyond = self._sorted[bisect.bisect_right(self._sorted, elapsed) :]
        return beyond[len(beyond) // 2] - elapsed if beyond else max(elapsed, default)


class TurnHazards:
    """Chance that a program ends at its k-th request, given that it gets there (Kaplan and Meier 1958).

    Programs that still live count among those at risk, so that the estimate is not drawn to short programs. Hazards
    are smoothed over neighbouring turns and towards their overall mean; those of one kind of programs towards those of
    all. Kind 0 is all programs, and those of which nothing is known.
    """

    KINDS = 4

    LONGEST = 256
    EVERY = 64
    """Requests after which the tables are made anew."""
    PRIOR = 6.0
    """Weight of the overall mean, in observations."""
    KIN = 20.0
    """Weight of all programs in the estimate for a kind, in observations."""
    WIDTH = 2.0
    """Of the smoothing, in turns."""

    def __init__(self) -> None:
        n, shape = self.LONGEST, (self.KINDS, self.LONGEST)
        self._risk, self._ends = np.zeros(shape), np.zeros(shape)
        self._seen = 0
        turns = np.arange(n)
        self._kernel = np.exp(-np.abs(turns[:, None] - turns) / self.WIDTH)
        self._remaining, self._index = np.ones(shape), np.ones(shape)
        self._make_tables()

    def observe(self, turn: int, last: bool, kind: int = 0) -> None:
        """Request number ``turn``, from 0, of a program of that kind has ended, and was its last or not."""
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
        mean = (self._ends[0].sum() + 1) / (self._risk[0].sum() + 8)
        ends, risk = self._ends @ self._kernel, self._risk @ self._kernel
        everybody = (ends[0] + self.PRIOR * mean) / (risk[0] + self.PRIOR)
        hazard = (ends + self.KIN * everybody) / (risk + self.KIN)
        hazard[0] = everybody
        hazard = np.clip(hazard, 1e-3, 1.0)
        after: float | np.ndarray = 1 / mean
        for turn in range(n - 1, -1, -1):
            self._remaining[:, turn] = after = 1 + (1 - hazard[:, turn]) * after
        padded = np.concatenate([hazard, np.full((self.KINDS, 64), mean)], axis=1)
        windows = np.lib.stride_tricks.sliding_window_view(padded, 64, axis=1)[:, :n]
        alive = np.cumprod(1 - windows, axis=2)  # after each turn of the horizon
        run = 1 + np.concatenate([np.zeros((self.KINDS, n, 1)), np.cumsum(alive[..., :-1], axis=2)], axis=2)
        self._index = 1 / ((1 - alive) / run).max(axis=2)


class Predictor:
    """Learns from what has ended: output lengths, tool times per tool, turns per program, seconds per step."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.transfers = TransferCosts()
        self.outputs = Distribution()
        """Tokens per request."""
        self.service = Distribution()
        """Tokens computed per request, as each program's mean."""
        self.tool_waits = Distribution()
        """Seconds per tool wait, of all tools."""
        self.tools: OrderedDict[str, Distribution] = OrderedDict()
        """The same by tool: the ``WINDOW`` named last, since names come from clients. The oldest is first."""
        self.talk = Distribution()
        """Output tokens per request, as each program's mean so far."""
        self.turns = Distribution()
        """Requests per program."""
        self.hazards = TurnHazards()
        self._progress = [0.0] * 6  # decaying sums over ended programs' moments k: n, k, r, kk, rr, kr

    # -- questions ---------------------------------------------------------------------------------------------

    def output_tokens(self, request: Request) -> float:
        """Tokens it will still output."""
        program = request.program
        prior = self.outputs.mean(100.0)
        own = (program.output_tokens + 2 * prior) / (program.turns + 2)  # its own mean, drawn to everybody's
        return max(own - len(request.output), 0.1 * own)

    def tool_s(self, program: Program, elapsed_s: float = 0.0) -> float:
        """Seconds that its present or next tool wait goes on after ``elapsed_s``."""
        return self.tool_times(program.tool).mean_beyond(elapsed_s, 1.0)

    def returns_in(self, program: Program, elapsed_s: float) -> float:
        """Seconds until its tool wait is as likely over as not."""
        return self.tool_times(program.tool).median_beyond(elapsed_s, 1.0)

    def tool_times(self, tool: str | None) -> Distribution:
        """Of that tool if enough is known about it, or of all."""
        own = self.tools.get(tool) if tool is not None else None
        return own if own is not None and len(own) >= ENOUGH else self.tool_waits

    def remaining_turns(self, program: Program) -> float:
        """Requests it will still run, the present or next one included."""
        return self.hazards.remaining(program.turns, self._kind(program.turns, program.output_tokens))

    def turns_index(self, program: Program) -> float:
        """Requests that it is worth to wait for its end; see :meth:`TurnHazards.index`."""
        return self.hazards.index(program.turns, self._kind(program.turns, program.output_tokens))

    def _kind(self, turns: int, outputs: int) -> int:
        """Of a program's hazards of ending: in which third its mean output per request lies; 0 before the first."""
        if turns == 0 or len(self.talk) < ENOUGH:
            return 0
        return 1 + sum(outputs / turns > self.talk.quantile(q, 0.0) for q in (1 / 3, 2 / 3))

    def program_s(self) -> float:
        """Seconds that a typical program runs in all."""
        return self.costs.decode_s(self.outputs.mean(100.0) * self.turns.mean(8.0))

    def remaining_s(self, request: Request) -> float:
        """Seconds of model time until its program ends, were it alone: this request and those after it."""
        own = self.costs.decode_s(self.output_tokens(request))
        later = self.costs.decode_s(self.outputs.mean(100.0))
        fresh = self.costs.prefill_s(max(1, request.known - request.reusable))
        return fresh + own + (self.remaining_turns(request.program) - 1) * later

    def request_s(self, request: Request) -> float:
        """Seconds of model time of this request, were it alone."""
        fresh = self.costs.prefill_s(max(1, request.known - request.reusable))
        return fresh + self.costs.decode_s(self.output_tokens(request))

    def eta(self) -> float:
        """Whether progress predicts completion: ``-Corr(k, N - k)`` of served against remaining turns over programs
        that have ended (Continuum, arXiv 2511.02230): 1 for a fixed number, 0 for a geometric one, below for more."""
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
