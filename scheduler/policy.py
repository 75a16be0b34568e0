"""The interface of a policy: in which order requests are served, and which may start.

A policy never looks at all waiting programs one by one. When a request is queued it writes down a few numbers about it
(``features``); when there is room, it scores all waiting requests at once from those columns and the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .prediction import Predictor
from .program import Program, Request
from .strategies import make_strategy

CLASS = 1e12
"""Difference of the scores of two classes, where all of one go before all of the other. Beside it a score, which must
stay far below it, is exact to 1e-4."""


class Pressure(NamedTuple):
    """The pool as policies see it."""

    page_size: int
    pages: int
    free: int
    retained: int
    """Pages that only programs without a running request hold; they can be evicted."""
    running: int
    """Running requests."""
    host_tier: bool
    """Whether there is a host tier, so that KV under pressure moves instead of being lost."""


class Policy:
    """Orders waiting requests, decides which may start, and which of the running ones are preempted.

    What becomes of the KV of programs that wait is the choice of its ``strategy``.
    """

    columns = 1
    """Length of what :meth:`features` returns."""
    backfill = 0
    """Later requests that are tried if the first in order does not fit; 0: it blocks them."""
    max_skips = 10**9
    """Number of times that later requests may start before the first in order; after that it blocks them."""
    tenants_share_pages = True
    """Whether tenants give pages by their shares (:mod:`~.page_shares`); if not, all programs count as one's."""
    residency: str | None = None
    """Name of the strategy that belongs to the policy; None: any."""

    def __init__(self, predictor: Predictor):
        self.predict = predictor
        self.strategy = make_strategy(self.residency or "adaptive", predictor)
        self.outdate: Callable[[Request], None] = lambda request: None
        """Call this when the features of a waiting request have changed; the scheduler sets it."""

    def features(self, request: Request) -> Sequence[float]:
        """Numbers about a request that is queued.

        They are asked for again only if its program loses KV, or after ``outdate``.
        """
        raise NotImplementedError

    def scores(self, features: np.ndarray, now: float, pressure: Pressure) -> np.ndarray:
        """Scores ``[n]`` of all waiting requests from ``features [n, columns]``.

        The lowest is first, equal ones go by submission.
        """
        return features[:, 0]

    def rank(self, request: Request) -> tuple[float, ...]:
        """Place among the running requests; the highest is preempted first, and the lowest never."""
        return (request.submitted, request.number)

    def admits(self, request: Request, now: float, pressure: Pressure) -> bool:
        """Whether a request may start now, if it fits."""
        return True

    # -- events ------------------------------------------------------------------------------------------------

    def queued(self, request: Request, now: float) -> None:
        """A request has arrived, with a new program or from a tool, or has been preempted."""

    def admitted(self, request: Request, now: float) -> None:
        """A request has got its pages."""

    def ended(self, request: Request, now: float) -> None:
        """A request has ended; its job's history includes it."""

    def forgotten(self, program: Program) -> None:
        """A program has ended."""


class WaitingQueue:
    """Waiting requests and their features, as columns; every change is O(1)."""

    def __init__(self, columns: int):
        self._requests: list[Request] = []
        self._at: dict[Request, int] = {}
        self._features = np.zeros((64, columns), order="F")  # scores are computed by columns
        self._numbers = np.zeros(64, np.int64)
        self._defers_until = np.zeros(64)
        self._tenants = np.zeros(64, np.int64)
        self._num_deferred = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: Request) -> bool:
        return request in self._at

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def push(self, request: Request, features: Sequence[float], tenant: int = 0) -> None:
        at = len(self._requests)
        if at == len(self._features):
            self._features = np.asfortranarray(np.concatenate([self._features, np.zeros_like(self._features)]))
            for name in ("_numbers", "_defers_until", "_tenants"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._requests.append(request)
        self._at[request] = at
        self._features[at] = features
        self._numbers[at] = request.number
        self._defers_until[at] = request.defers_until
        self._tenants[at] = tenant
        self._num_deferred += request.priority > 0

    def update(self, request: Request, features: Sequence[float]) -> None:
        self._features[self._at[request]] = features

    def remove(self, request: Request) -> None:
        at = self._at.pop(request)
        last = self._requests.pop()
        if last is not request:
            n = len(self._requests)
            self._requests[at], self._at[last] = last, at
            self._features[at], self._numbers[at] = self._features[n], self._numbers[n]
            self._defers_until[at], self._tenants[at] = self._defers_until[n], self._tenants[n]
        self._num_deferred -= request.priority > 0

    def first(
        self, policy: Policy, now: float, pressure: Pressure, count: int, classes: np.ndarray | None = None
    ) -> Iterator[Request]:
        """Yield the first ``count`` requests in the order of the policy, each found when it is asked for.

        Those of priorities above 0 come after the others, until each has waited long enough. Among either, tenants of
        lower ``classes``, by the place of the tenant, come before the others; None: all are equal.
        """
        n = len(self._requests)
        if n == 0:
            return
        scores, numbers = policy.scores(self._features[:n], now, pressure), self._numbers[:n]
        if not self._num_deferred and classes is None:
            for at in _lowest(scores, numbers, count):
                yield self._requests[at]
            return
        groups = np.zeros(n, np.int64) if classes is None else classes[self._tenants[:n]]
        groups += (self._defers_until[:n] > now) * (1 + int(groups.max()))
        for group in np.flatnonzero(np.bincount(groups)):
            rows = np.flatnonzero(groups == group)
            for at in _lowest(scores[rows], numbers[rows], count):
                yield self._requests[rows[at]]
            count -= len(rows)


def _lowest(scores: np.ndarray, numbers: np.ndarray, count: int) -> Iterator[int]:
    """Yield where the ``count`` lowest scores are, in order; equal ones go by number."""
    count = min(count, len(scores))
    if count < 1:
        return
    at = int(scores.argmin())
    equal = scores == scores[at]
    if np.count_nonzero(equal) > 1:
        ties = np.flatnonzero(equal)
        at = int(ties[numbers[ties].argmin()])
    yield at
    if count > 1:  # rarely needed
        bound = np.partition(scores, count - 1)[count - 1]
        near = np.flatnonzero(scores <= bound)
        yield from near[np.lexsort((numbers[near], scores[near]))][1:count].tolist()
