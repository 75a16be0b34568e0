"""Families of made-up agents, to judge a scheduler by workloads on which none of its constants was chosen.

Their programs have 2 to 150 requests, with other tails and other growth than the recorded sessions. They are made up:
no figure comes from a source. In ``family-short``, ``family-long`` and ``family-heavy`` the number of requests is drawn
apart from all else, so only the request that a program has come to tells how many are left; in ``family-talk`` its
outputs tell it, and in ``family-phased`` its tools do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .distributions import LogNormal
from .trace import TraceRequest, chain

Requests = tuple[TraceRequest, ...]
MOST_REQUESTS = 150
TYPICAL_REQUESTS = 30
"""Requests of a program whose outputs :attr:`Family.talk` leaves as they are drawn."""
TOOLS = {tool: LogNormal(1.3 if tool == "shell" else 0.05, 0.8) for tool in ("read", "search", "shell", "edit", "note")}
"""Seconds that tools take."""


@dataclass(frozen=True)
class Family:
    """Programs whose lengths and times are drawn independently of each other, but for :attr:`talk`."""

    requests: Callable[[random.Random], float]
    first: float
    """Median tokens of the first prompt."""
    growth: LogNormal
    """New prompt tokens of each later request."""
    output: LogNormal
    """Output tokens per request."""
    talk: float = 0.0
    """Exponent with which outputs grow in the number of requests: below 0, long programs output little."""

    def __call__(self, rng: random.Random) -> Requests:
        count = max(2, min(MOST_REQUESTS, round(self.requests(rng))))
        scale = (count / TYPICAL_REQUESTS) ** self.talk
        outputs = [min(4000, max(1, round(scale * self.output.draw(rng)))) for _ in range(count)]
        later = [max(1, round(min(20_000.0, self.growth.draw(rng)))) for _ in range(count - 1)]
        first = max(500, round(LogNormal(self.first, 0.15).draw(rng)))
        tools = [rng.choices(("edit", "shell"), (0.7, 0.3))[0] for _ in range(count - 1)]
        return chain([first, *later], outputs, [(tool, TOOLS[tool].draw(rng)) for tool in tools])


def phased(rng: random.Random) -> Requests:
    """Programs that read, then edit and test by turns until the tests pass; what is hard takes more of each."""
    hard = LogNormal(1.0, 0.7).draw(rng)
    reads = max(1, round(6 * hard * LogNormal(1, 0.4).draw(rng)))
    tools = [rng.choice(["read", "search", "shell"]) for _ in range(reads)]
    for _ in range(max(1, round(4 * hard * LogNormal(1, 0.5).draw(rng)))):
        tools += ["edit"] * rng.randint(1, 3) + ["shell"] + ["read"] * (rng.random() < 0.4)
    tools = tools[: MOST_REQUESTS - 2] + ["note"] * (rng.random() < 0.6)
    new = {"read": 1500, "search": 300, "shell": 400, "edit": 150, "note": 100}
    output = {"read": 90, "search": 80, "shell": 150, "edit": 400, "note": 200}
    outputs = [max(1, round(LogNormal(output[tool], 0.7).draw(rng))) for tool in tools]
    outputs.append(max(1, round(LogNormal(350, 0.5).draw(rng))))
    later = [max(1, round(LogNormal(new[tool], 1.0).draw(rng))) for tool in tools]
    return chain([12_000, *later], outputs, [(tool, TOOLS[tool].draw(rng)) for tool in tools])


FAMILIES: dict[str, Callable[[random.Random], Requests]] = {
    "family-short": Family(LogNormal(10, 0.5).draw, 4000, LogNormal(500, 1.2), LogNormal(150, 1.0)),
    "family-long": Family(lambda rng: rng.gammavariate(2.8, 16.0), 13_000, LogNormal(500, 1.2), LogNormal(150, 1.0)),
    "family-heavy": Family(LogNormal(22, 1.0).draw, 8000, LogNormal(400, 1.2), LogNormal(120, 1.1)),
    "family-talk": Family(LogNormal(30, 0.8).draw, 10_000, LogNormal(500, 1.2), LogNormal(150, 0.8), talk=-0.5),
    "family-phased": phased,
}
CHANGES = {"family-change": ("family-short", "family-long")}
"""Workloads that change in the middle: the families of the first and of the second half of their programs."""
