"""How long a new request would wait for its start: learned from those that have started.

By Little's law a request waits as long as those ahead of it take to start. How many those are is the policy's affair,
and differs with the work that a program has left: so the seconds of wait for each request that was there already are
learned apart for every decile of remaining model time, and multiplied by how many are there now. That needs nothing of
the policy, costs some microseconds per request, and follows the length of the queue at once. How good it is stands in
benchmarks/RESULTS.md, "Waits that replicas report".
"""

from __future__ import annotations

import bisect
from itertools import accumulate

from .distribution import Distribution

DECILES = 10
FORGET = 0.998
"""Weight of a start against the next one: about the last five hundred count, fifty of each decile. Swept over 0.95,
0.99 and 0.998."""


class StartWaits:
    """Learns from every request that starts, and estimates the wait of one that would come now."""

    def __init__(self) -> None:
        self._remaining = Distribution()
        self._waits, self._ahead = [0.0] * DECILES, [0.0] * DECILES  # decaying sums by decile

    def observe(self, waited_s: float, ahead: int, remaining_s: float) -> None:
        """Learn that a request has started.

        Args:
            waited_s: seconds that it has waited.
            ahead: requests that were waiting when it came, itself included.
            remaining_s: model time that its program had left then.
        """
        decile = self.decile(remaining_s)
        self._remaining.add(remaining_s)
        for sums, new in ((self._waits, waited_s), (self._ahead, float(ahead))):
            sums[:] = [FORGET * old for old in sums]
            sums[decile] += new

    def expected(self, ahead: int) -> tuple[float, ...]:
        """Seconds that a request would wait behind ``ahead`` others, by decile of remaining model time, ascending.

        A decile is drawn to the mean of all by as much as that has seen in one decile. Any thread may ask.
        """
        waits, counts = [*self._waits], [*self._ahead]
        prior_s, prior = sum(waits) / DECILES, sum(counts) / DECILES
        if not prior:
            return (0.0,) * DECILES
        each = [(s + prior_s) / (n + prior) for s, n in zip(waits, counts, strict=True)]
        return tuple(ahead * longest for longest in accumulate(each, max))

    def decile(self, remaining_s: float) -> int:
        """The decile of a remaining model time among those of the requests that have started."""
        seen = self._remaining.values
        return min(DECILES - 1, DECILES * bisect.bisect_left(seen, remaining_s) // len(seen)) if seen else 0
