"""How long waits take: learned online, for every owner alone, since tenants must not learn from each other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np

from .distribution import ENOUGH, Distribution
from .histogram import Histogram
from .program import Program

FEW_SECONDS = 1.0
"""Seconds per tool wait, before anything is known: a guess, which only orders the first few programs."""
HUMAN_S = 85.0
"""Seconds until a human answers, before enough is known: the median of TraceLab (arXiv 2606.30560)."""
MAX_KNOWN, MAX_TOOLS = 1024, 64
"""Distributions remembered of all owners, and tools of one owner, since names come from clients: guesses."""
MAX_TOGETHER, PARTS = 8, 64
"""Tools called together whose times are combined, the slowest ones, and values that stand for the distribution of each:
guesses, which bound the time of a combination to a fraction of a millisecond."""
WAIT_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Bounds of waits that are counted."""
NOTHING = Distribution()
"""The distribution of what nobody has seen."""


class WaitCounts:
    """Times that programs have waited, and errors of their predictions."""

    def __init__(self) -> None:
        self.seconds = Histogram(WAIT_S)
        self.errors = Histogram(WAIT_S)
        """Between the seconds predicted and those that a wait took, whichever was more."""

    def add(self, took_s: float, predicted_s: float) -> None:
        """Count a wait."""
        self.seconds.add(took_s)
        self.errors.add(abs(took_s - predicted_s))


class _Known:
    """What is known of an owner's waits."""

    def __init__(self) -> None:
        self.tools = Distribution()
        """Seconds per wait, of all tools and of waits of which nobody has said what they are for."""
        self.humans = Distribution()
        self.by_tools: OrderedDict[tuple[str, ...], Distribution] = OrderedDict()
        """Seconds by the tools that were called together, in order; those named longest ago first."""


class WaitTimes:
    """Distributions of waits: of an owner's tools, of tools called together, and of the owner's humans.

    Bounds hold whatever names clients choose: an owner that names many tools forgets its own, and when there are too
    many distributions in all, the owner whose programs have waited longest ago is forgotten.
    """

    def __init__(self) -> None:
        self.tools, self.humans = WaitCounts(), WaitCounts()
        self._owners: OrderedDict[Hashable, _Known] = OrderedDict()  # longest ago first
        self._size = 0  # distributions, of which every owner has two

    def of(self, program: Program) -> Distribution:
        """Seconds that waits such as the present one of a program take; its owner's tools if not enough is known."""
        known = self._owners.get(program.owner)
        if known is None:
            return NOTHING
        if program.wait is None:
            return known.tools
        if program.awaits_human:
            return known.humans if len(known.humans) >= ENOUGH else NOTHING
        own = known.by_tools.get(_key(program))
        if own is not None and len(own) >= ENOUGH:
            return own
        return program.together or known.tools

    def default_s(self, program: Program) -> float:
        """Seconds that its present wait takes as far as anybody can tell who has seen nothing."""
        return HUMAN_S if program.awaits_human else FEW_SECONDS

    def together(self, program: Program) -> Distribution | None:
        """Seconds until the last of several tools returns, from what is known of each; None if that is nothing."""
        known = self._owners.get(program.owner)
        tools = program.wait.wait.tools if program.wait is not None else ()
        if known is None or len(tools) < 2:
            return None
        calls = {name: known.by_tools.get((name,), NOTHING) for name in tools}
        if all(len(own) < ENOUGH for own in calls.values()):
            return None
        parts = [(own if len(own) >= ENOUGH else known.tools, tools.count(name)) for name, own in calls.items()]
        return maximum(sorted(parts, key=lambda part: part[0].mean(0.0))[-MAX_TOGETHER:])

    def add(self, program: Program, took_s: float, predicted_s: float) -> None:
        """Learn that the wait of a program has ended."""
        known = self._owners.pop(program.owner, None)
        if known is None:
            known = _Known()
            self._size += 2
        self._owners[program.owner] = known  # the latest
        if program.awaits_human:
            self.humans.add(took_s, predicted_s)
            known.humans.add(took_s)
        else:
            self.tools.add(took_s, predicted_s)
            known.tools.add(took_s)
            if program.wait is not None:
                self._named(known, _key(program)).add(took_s)
        while self._size > MAX_KNOWN and len(self._owners) > 1:
            self._size -= 2 + len(self._owners.popitem(last=False)[1].by_tools)

    def _named(self, known: _Known, key: tuple[str, ...]) -> Distribution:
        """The distribution of tools called together, as those named last."""
        own = known.by_tools.pop(key, None)
        if own is None:
            own = Distribution()
            self._size += 1
        known.by_tools[key] = own
        if len(known.by_tools) > MAX_TOOLS:
            known.by_tools.popitem(last=False)
            self._size -= 1
        return own


def maximum(parts: Sequence[tuple[Distribution, int]]) -> Distribution:
    """Distribution of the largest of independent quantities, each with how often it is drawn."""
    thinned = [part.values[:: max(1, len(part) // PARTS)] for part, _ in parts]
    values = np.sort(np.concatenate(thinned))
    below = np.ones(len(values))
    for own, (_, times) in zip(thinned, parts, strict=True):
        below *= (np.searchsorted(own, values, side="right") / len(own)) ** times
    largest = Distribution()
    for at in np.searchsorted(below, (np.arange(PARTS) + 0.5) / PARTS):
        largest.add(float(values[min(int(at), len(values) - 1)]))
    return largest


def _key(program: Program) -> tuple[str, ...]:
    return tuple(sorted(program.wait.wait.tools)) if program.wait is not None else ()
