"""Loads for engines beside each other, and the tables of what they made of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from astraea_jax.lab.peer_engines import Load, Ready, Served
from astraea_jax.lab.record import Section

OURS = "astraea"
Results = dict[str, dict[str, list[Served]]]
"""Engine -> workload -> what each repetition gave; an engine that failed has fewer."""


@dataclass(frozen=True)
class Figure:
    """A figure of a load that was served."""

    name: str
    of: Callable[[Served], float]
    digits: int


RATE = Figure("tok/s", lambda served: sum(map(len, served.tokens)) / served.seconds, 1)
TTFT = Figure("TTFT, s (less is better)", lambda served: statistics.median(served.ttft), 3)
JCT = Figure("mean JCT, s (less is better)", lambda served: statistics.mean(served.jct), 1)


@dataclass(frozen=True)
class Workload:
    """Programs that begin together, and what is looked at."""

    programs: int
    turns: int
    new: int
    """Tokens that each turn adds."""
    output: int
    figures: tuple[Figure, ...]
    wait_s: float = 0.0

    def load(self, vocab: int, seed: int) -> Load:
        """Draw random token ids."""
        tokens = np.random.default_rng(seed).integers(0, vocab, (self.programs, self.turns, self.new))
        return Load(tokens.tolist(), [self.output] * self.programs, self.wait_s)

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return self.turns * (self.new + self.output)

    def __str__(self) -> str:
        turns = f" x {self.turns} turns" if self.turns > 1 else ""
        return f"{self.programs}{turns} x ({self.new} in, {self.output} out)"


WORKLOADS = {
    "batch": Workload(32, 1, 128, 32, (RATE,)),
    "batch_long": Workload(32, 1, 128, 128, (RATE,)),
    "few": Workload(8, 1, 32, 64, (RATE,)),
    "one": Workload(1, 1, 512, 32, (RATE, TTFT)),
    "agents": Workload(16, 5, 170, 30, (JCT,), wait_s=0.2),
}


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the range if there are several."""
    if not values:
        return ""
    several = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.{digits}f}{several}"


def same_tokens(ours: Sequence[Served], theirs: Sequence[Served]) -> tuple[int, int]:
    """Programs that were given the same tokens, and all programs."""
    pairs = [pair for a, b in zip(ours, theirs) for pair in zip(a.tokens, b.tokens)]
    return sum(a == b for a, b in pairs), len(pairs)


def figures_section(results: Results, workloads: dict[str, Workload], title: str) -> Section:
    """What each engine reached."""
    rows = [
        (
            f"{key}: {workload}",
            figure.name,
            *(spread([*map(figure.of, r[key])], figure.digits) for r in results.values()),
        )
        for key, workload in workloads.items()
        for figure in workload.figures
    ]
    return Section(f"{title}: medians (ranges)", ("", "", *results), rows, named=2)


def ratios_section(results: Results, workloads: dict[str, Workload]) -> Section:
    """What ours reached over what each other engine did."""
    others = [name for name in results if name != OURS]
    rows = []
    for key, workload in workloads.items():
        for figure in workload.figures:
            ratios = [
                [figure.of(a) / figure.of(b) for a, b in zip(results[OURS][key], results[n][key])] for n in others
            ]
            rows.append((key, figure.name, *(spread(of_one, 2) for of_one in ratios)))
    return Section("Ours over theirs, by repetition: medians (ranges)", ("", "", *others), rows, named=2)


def engines_section(results: Results, states: dict[str, Ready | str]) -> Section:
    """Which engines ran, whether their tokens are ours, and why others did not run."""
    rows = []
    for name, state in states.items():
        ready = (state.version, f"{state.start_s:.0f} s", state.note) if isinstance(state, Ready) else ("", "", state)
        same, programs = np.sum(
            [same_tokens(results[OURS][key], runs) for key, runs in results.get(name, {}).items()] or [(0, 0)], axis=0
        )
        rows.append((name, ready[0], ready[1], f"{same} of {programs}" if programs and name != OURS else "", ready[2]))
    columns = ("", "version", "start", "programs with our tokens", "how, or why not")
    return Section("Engines", columns, rows)
