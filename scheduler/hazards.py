"""The chance that a job ends with its next request, learned from those that have ended and those that go on."""

from __future__ import annotations

import math

import numpy as np


class TurnHazards:
    """Learns the chance that a job ends at its k-th request, given that it gets there (Kaplan and Meier 1958).

    Jobs that go on count among those at risk, so that the estimate is not drawn to short ones. Hazards
    are smoothed over neighbouring turns and towards their overall mean; those of one kind of jobs towards those of all.
    Kind 0 is all jobs, and stands for those of which nothing is known.

    What a job outputs says more than its kind. Its ``talk`` is the log of its output per request over that of all, and
    its hazards are those of its kind times ``exp(slope * talk)`` (Cox 1972). The slope is learned as an extended Kalman
    filter would, request by request; it is 0, and talk says nothing, until requests have shown otherwise.

    Every operation takes some microseconds, because the scheduling loop calls them: requests are smoothed as they are
    counted, and what follows from the hazards is worked out for the one turn that is asked for.
    """

    KINDS = 4
    LONGEST = 256
    """Turns that are told apart; later ones count as the last of these."""
    HORIZON = 64
    """Turns that the Gittins index looks ahead: beyond it the chance to be alive is small on every workload here."""
    EVERY = 64
    """Requests after which the hazards are estimated anew."""
    PRIOR = 6.0
    """Weight of the overall mean, in observations: a guess, small against what a busy server sees in a minute."""
    KIN = 20.0
    """Weight of all jobs in the estimate for a kind, in observations: a guess; benchmarks/RESULTS.md says when
    kinds gain."""
    DOUBT = 4.0
    """Information that a slope of 0 has at first, and the least that forgetting leaves any slope: a guess."""
    STEEPEST = 4.0
    """Bound of the slope, so that no tenant's jobs can drive the hazards of others to nothing."""
    FORGET = 0.9998
    """Weight of a request against the one after it, in the slope: a guess, about the last five thousand count."""
    FARTHEST = 2.0
    """Talk beyond which more of it says no more: seven times the mean, or a seventh of it."""
    WIDTH = 2.0
    """Scale of the smoothing, in turns: a guess."""
    FEWEST_ENDS, FEWEST_TURNS = 1.0, 8.0
    """Counted beside what was seen, so that jobs last eight turns before anything is known: a guess."""

    def __init__(self) -> None:
        n, shape = self.LONGEST, (self.KINDS, self.LONGEST)
        turns = np.arange(n)
        self._kernel = np.exp(-np.abs(turns[:, None] - turns) / self.WIDTH)
        self._risk, self._ends = np.zeros(shape), np.zeros(shape)  # counts by kind and turn, smoothed over turns
        self._all_risk, self._all_ends = 0, 0
        self._slope, self._sure = 0.0, self.DOUBT
        self._mean = 0.0
        self._hazards = np.zeros((self.KINDS, n + self.HORIZON))
        self._estimate()

    def observe(self, turn: int, kind: int = 0, talk: float = 0.0, *, last: bool) -> None:
        """Learn that request number ``turn``, from 0, of such a job has ended, and was its last or not."""
        at, talk = min(turn, self.LONGEST - 1), self._bounded(talk)
        factor = math.exp(self._slope * talk)
        chance = min(self._hazards[kind, at] * factor, 1.0)
        self._sure = max(self.FORGET * self._sure + chance * talk * talk, self.DOUBT)
        self._learn(-chance * talk)
        for row in {0, kind}:
            self._risk[row] += factor * self._kernel[at]
        self._all_risk += 1
        if last:
            self.ended(turn, kind, talk)
        if self._all_risk % self.EVERY == 0:
            self._estimate()

    def ended(self, turn: int, kind: int = 0, talk: float = 0.0) -> None:
        """Learn that a request which has been observed as not the last was the last after all."""
        self._learn(self._bounded(talk))
        for row in {0, kind}:
            self._ends[row] += self._kernel[min(turn, self.LONGEST - 1)]
        self._all_ends += 1

    def remaining(self, turn: int, kind: int = 0, talk: float = 0.0) -> float:
        """Expected requests from number ``turn`` on, itself included."""
        alive = self._alive(min(turn, self.LONGEST - 1), self.LONGEST, kind, talk)
        return float(1 + alive[:-1].sum() + alive[-1] / self._mean)

    def index(self, turn: int, kind: int = 0, talk: float = 0.0) -> float:
        """Inverse Gittins index: the least expected requests per chance to end, over all horizons (Gittins 1979)."""
        turn = min(turn, self.LONGEST - 1)
        alive = self._alive(turn, turn + self.HORIZON, kind, talk)
        run = np.concatenate([[1.0], 1 + np.cumsum(alive[:-1])])
        return float(1 / ((1 - alive) / run).max())

    def _alive(self, begin: int, end: int, kind: int, talk: float) -> np.ndarray:
        """Chances that a job which comes to request ``begin`` goes on after each of those before ``end``."""
        hazards = self._hazards[kind, begin:end] * math.exp(self._slope * self._bounded(talk))
        alive: np.ndarray = np.cumprod(1 - np.minimum(hazards, 1.0))
        return alive

    def _learn(self, gradient: float) -> None:
        self._slope = min(max(self._slope + gradient / self._sure, -self.STEEPEST), self.STEEPEST)

    def _bounded(self, talk: float) -> float:
        return min(max(talk, -self.FARTHEST), self.FARTHEST)

    def _estimate(self) -> None:
        self._mean = (self._all_ends + self.FEWEST_ENDS) / (self._all_risk + self.FEWEST_TURNS)
        everybody = (self._ends[0] + self.PRIOR * self._mean) / (self._risk[0] + self.PRIOR)
        hazards = (self._ends + self.KIN * everybody) / (self._risk + self.KIN)
        hazards[0] = everybody
        self._hazards[:, : self.LONGEST] = np.clip(hazards, 1e-3, 1.0)
        self._hazards[:, self.LONGEST :] = self._mean
