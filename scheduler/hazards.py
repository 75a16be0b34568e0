"""The chance that a job ends with its next request, learned from those that have ended and those that go on."""

from __future__ import annotations

import numpy as np


class TurnHazards:
    """Learns the chance that a job ends at its k-th request, given that it gets there (Kaplan and Meier 1958).

    Jobs that go on count among those at risk, so that the estimate is not drawn to short ones. Hazards
    are smoothed over neighbouring turns and towards their overall mean; those of one kind of jobs towards those of all.
    Kind 0 is all jobs, and stands for those of which nothing is known.
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
    """Weight of all jobs in the estimate for a kind, in observations: a guess; benchmarks/RESULTS.md says when
    kinds gain."""
    WIDTH = 2.0
    """Scale of the smoothing, in turns: a guess."""
    FEWEST_ENDS, FEWEST_TURNS = 1.0, 8.0
    """Counted beside what was seen, so that jobs last eight turns before anything is known: a guess."""

    def __init__(self) -> None:
        n, shape = self.LONGEST, (self.KINDS, self.LONGEST)
        self._risk, self._ends = np.zeros(shape), np.zeros(shape)
        self._seen = 0
        turns = np.arange(n)
        self._kernel = np.exp(-np.abs(turns[:, None] - turns) / self.WIDTH)
        self._remaining, self._index = np.ones(shape), np.ones(shape)
        self._make_tables()

    def observe(self, turn: int, kind: int = 0, *, last: bool) -> None:
        """Learn that request number ``turn``, from 0, of a job of that kind has ended, and was its last or not."""
        at = min(turn, self.LONGEST - 1)
        for row in {0, kind}:
            self._risk[row, at] += 1
            self._ends[row, at] += last
        self._seen += 1
        if self._seen % self.EVERY == 0:
            self._make_tables()

    def ended(self, turn: int, kind: int = 0) -> None:
        """Learn that a request which has been observed as not the last was the last after all."""
        for row in {0, kind}:
            self._ends[row, min(turn, self.LONGEST - 1)] += 1

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
