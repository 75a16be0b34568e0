"""Placement: on which replica the next request of a program runs.

Every replica says of itself how much it holds and how long a request would wait (:class:`Report`); a router adds what
it has sent since then (:class:`Fleet`). The cost of a request on each replica is, in seconds,

    wait + prefill of what is missing there + fetch from its host tier + price of the memory it newly needs

where a placement is charged for what it does to others as well (the lesson of FATE, arXiv 2605.07238): prefill delays
every request in progress there (so the product of LMetric, arXiv 2603.15202, is a term of it), and the KV that is
evicted to make room has to be brought back later. Both make a move dear, so a program leaves its home, the replica that
has its KV, only if it waits much longer there. What the terms are worth is in benchmarks/RESULTS.md, "A fleet".
Baselines from other systems are in ``rival_placements.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Protocol

import numpy as np

DECILES = 10
MOST = 1e15
"""Bound of every number of a report, so that sums of many stay exact."""
HALF_LIFE_S = 5.0
"""Seconds in which a report comes to count half: several times the second in which replicas report, and about as long
as a request of an agent runs, so older ones describe requests that have ended."""
GUESSED_PREFILL_S = 5e-5
"""Seconds per prefilled token while no replica has reported: of the size that small models have. Then it is a factor of
all costs."""


class ReportError(ValueError):
    """A report says something impossible; the message names the field."""


@dataclass(frozen=True)
class Report:
    """What a replica says of itself. Sizes in tokens of KV, times in seconds."""

    pool: int
    """Tokens that the device's pool holds."""
    free: int
    """Those of them that could be had without evicting anything."""
    retained: int
    """Those of them that only programs hold that do not run, so they can be evicted."""
    host_free: int
    """Tokens that the host tier has room for; 0: there is none."""
    live: int
    """Contexts of all live programs, tool waits included."""
    demand: float
    """The same, where the context of a program in a tool wait fades with the time it has been idle."""
    running: int
    waiting: int
    tool_waits: int
    wait_s: tuple[float, ...]
    """Estimated wait of a new request, by decile of its remaining model time, ascending."""
    prefill_s: float
    """Seconds per prefilled token."""
    step_s: float
    """Seconds of a step in the mean."""
    restore_s: float
    """Seconds per token restored from the host tier."""
    draining: bool = False
    sessions: int = 0

    def __post_init__(self) -> None:
        if len(self.wait_s) != DECILES:
            raise ReportError(f"wait_s has {len(self.wait_s)} numbers; {DECILES} are needed, one for each decile")
        for name, value in self.fields().items():
            if not 0 <= value <= MOST:  # NaN, too
                raise ReportError(f"{name} is {value}; it must be a number from 0 to {MOST:g}")
        if self.pool == 0:
            raise ReportError("pool is 0; a replica holds at least one token")

    def fields(self) -> dict[str, float]:
        """Every number under a name, for gauges and messages; ``wait_s`` as ``wait_s_0`` to ``wait_s_9``.

        What is counted are integers, ``draining`` 0 or 1.
        """
        flat = {f.name: value for f, value in zip(fields(self), astuple(self), strict=True) if f.name != "wait_s"}
        flat["draining"] = int(self.draining)
        return flat | {f"wait_s_{i}": wait for i, wait in enumerate(self.wait_s)}

    @staticmethod
    def from_fields(flat: Mapping[str, object]) -> Report:
        """Read what :meth:`fields` wrote; names that are not known are ignored, for newer replicas may say more.

        Raises:
            ReportError: a number is missing, is none, or is out of its range.
        """
        values: dict[str, float] = {}
        for name in (*_SCALARS, *(f"wait_s_{i}" for i in range(DECILES))):
            value = flat.get(name)
            if not isinstance(value, int | float) or not 0 <= value <= MOST:  # nor NaN
                raise ReportError(f"{name} is {value!r}; it must be a number from 0 to {MOST:g}")
            values[name] = value
        waits = tuple(float(values.pop(f"wait_s_{i}")) for i in range(DECILES))
        draining = bool(values.pop("draining"))
        whole = {name: int(value) for name, value in values.items() if name not in _FRACTIONS}
        rest = {name: float(values[name]) for name in _FRACTIONS}
        return Report(**whole, **rest, wait_s=waits, draining=draining)  # type: ignore[arg-type]


_SCALARS = tuple(f.name for f in fields(Report) if f.name != "wait_s")
_FRACTIONS = ("demand", "prefill_s", "step_s", "restore_s")


@dataclass(frozen=True)
class Segment:
    """A request as placement sees it. Replicas are named by their index in the fleet."""

    tokens: int
    """Tokens of its prompt."""
    home: int | None = None
    """The replica that has its program; None: it is the program's first request, or that replica is gone."""
    held: int = 0
    """Tokens of it that are computed at home, on the device or the host."""
    on_host: int = 0
    """Those of them that only the host tier has."""
    shared: Mapping[int, int] = field(default_factory=dict)
    """Tokens of it that other replicas have, as a parent's prefix or a common one."""
    key: int = 0
    """A number that is the same for all requests of a program, for rules that hash."""


class Fleet:
    """What is known of every replica, as columns ``[R]``: its last report, and what the router has sent there."""

    REPORTED = ("pool", "free", "retained", "host_free", "live", "waiting", "prefill_s", "restore_s")
    """Fields of reports that rules of placement read."""

    def __init__(self, size: int = 0):
        self.now = 0.0
        """Seconds; written by the router before a placement."""
        self.takes = np.zeros(size, bool)
        """Whether it takes programs that it does not have yet."""
        self.reported_at = np.full(size, -np.inf)
        self.report = {name: np.zeros(size) for name in self.REPORTED}
        self.wait_s = np.zeros((size, DECILES))
        self.requests = np.zeros(size)
        """Requests that the router has sent and that have not ended."""
        self.fresh = np.zeros(size)
        """Tokens of their prompts that were not computed there."""
        self.context = np.zeros(size)
        """Tokens of their prompts."""
        self.homes = np.zeros(size)
        """Contexts of all programs whose home it is."""
        self.requests_then = np.zeros(size)
        """``requests`` at the time of the last report."""
        self.context_then = np.zeros(size)
        """``context`` at that time."""

    def __len__(self) -> int:
        return len(self.takes)

    def grow(self, size: int) -> None:
        """Make room for so many replicas."""
        larger = Fleet(size)
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray):
                getattr(larger, name)[: len(column)] = column
        for name, column in self.report.items():
            larger.report[name][: len(column)] = column
        larger.now = self.now
        vars(self).update(vars(larger))

    def clear(self, index: int) -> None:
        """Forget everything about a replica."""
        for column in (*vars(self).values(), *self.report.values()):
            if isinstance(column, np.ndarray):
                column[index] = 0
        self.reported_at[index] = -np.inf

    def learn(self, index: int, report: Report, now: float) -> None:
        """Take in a report."""
        for name, column in self.report.items():
            column[index] = getattr(report, name)
        self.wait_s[index] = report.wait_s
        self.reported_at[index] = now
        self.requests_then[index], self.context_then[index] = self.requests[index], self.context[index]

    def trust(self) -> np.ndarray:
        """Weight ``[R]`` of each replica's report: 1 when it is new, 0 without any."""
        return np.exp2(np.minimum(0.0, (self.reported_at - self.now) / HALF_LIFE_S))

    def of_reports(self, name: str, default: float) -> np.ndarray:
        """A reported column ``[R]``, with the mean of the others for replicas that have not reported."""
        column, known = self.report[name], self.reported_at > -np.inf
        if known.all():
            return column
        return np.where(known, column, column[known].mean() if known.any() else default)


class Rule(Protocol):
    """A rule of placement."""

    def __call__(self, segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
        """Choose one of the replicas ``allowed [R]`` (at least one is)."""
        ...


def missing(segment: Segment, fleet: Fleet) -> np.ndarray:
    """Tokens ``[R]`` of a request that each replica would have to compute."""
    tokens = np.full(len(fleet), float(segment.tokens))
    for index, found in segment.shared.items():
        tokens[index] = segment.tokens - found
    if segment.home is not None:
        tokens[segment.home] = min(tokens[segment.home], segment.tokens - segment.held)
    return np.maximum(tokens, 1.0)  # the last one is always computed


def waits(fleet: Fleet) -> np.ndarray:
    """Seconds ``[R]`` that a request waits for its start: what was reported, for as many as wait now.

    A request that was sent since the report counts as waiting where others do. Without a report there is no wait, only
    requests in progress that prefill delays.
    """
    reported = fleet.wait_s[:, DECILES // 2]
    for_each = reported / np.maximum(1.0, fleet.report["waiting"])
    now: np.ndarray = fleet.trust() * np.maximum(0.0, reported + for_each * (fleet.requests - fleet.requests_then))
    return now


def evictions(segment: Segment, fleet: Fleet) -> np.ndarray:
    """Tokens ``[R]`` of KV that give way to a request: those of programs that do not run there."""
    new = missing(segment, fleet)
    if segment.home is not None:
        new[segment.home] += segment.on_host
    free = fleet.report["free"] - (fleet.context - fleet.context_then)
    there = fleet.trust() * fleet.report["retained"]
    evicted: np.ndarray = np.minimum(np.maximum(0.0, new - np.maximum(0.0, free)), there)
    return evicted


def costs(segment: Segment, fleet: Fleet) -> np.ndarray:
    """Cost ``[R]`` of a request on each replica, in seconds."""
    prefill_s = fleet.of_reports("prefill_s", GUESSED_PREFILL_S)
    back_s = np.where(fleet.report["host_free"] > 0, fleet.report["restore_s"], prefill_s)
    found: np.ndarray = waits(fleet) + evictions(segment, fleet) * back_s
    found += missing(segment, fleet) * prefill_s * (1.0 + fleet.requests)
    if segment.home is not None:
        found[segment.home] += segment.on_host * back_s[segment.home]
    return found


def place(segment: Segment, fleet: Fleet, allowed: np.ndarray) -> int:
    """Choose the replica of least cost; of almost equal ones that with the fewest requests, then with the least KV.

    A program stays at home unless another replica gains more than ``MARGIN_S``.
    """
    found = np.where(allowed, costs(segment, fleet), np.inf)
    home, least = segment.home, float(found.min())
    if home is not None and found[home] - least <= MARGIN_S and allowed[home]:
        return home
    ties = np.flatnonzero(found <= (1 + EQUAL) * least)
    return int(ties[np.lexsort((fleet.homes[ties], fleet.requests[ties]))[0]])


MARGIN_S = 1.0
"""Gain in seconds below which a program stays where it is: what is known of a replica is about a second old."""
EQUAL = 0.05
"""Difference of two costs, relative, below which they count as equal: about the error of a learned time."""
