"""What the device executed while it was traced: kernel launches of a step, how long it was idle, where the time went.

XLA's profiler runs the kernels of a CUDA graph one by one, so the idle time of a GPU is an upper bound.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import jax

from astraea_jax.lab.record import Section

MOST_KERNELS = 15
"""Kernels that a table names."""


def traced(folder: str | Path) -> AbstractContextManager[None]:
    """Trace the device into ``folder``, without Python's calls, which would slow the host."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return jax.profiler.trace(str(folder), profiler_options=options)


@dataclass(frozen=True)
class Profile:
    """Figures of the steps that were traced."""

    steps: int
    launches: float
    """Kernels per step; on a CPU, operations of XLA."""
    busy_ms: float
    """Time per step in which at least one of them ran."""
    span_ms: float
    """Time per step from the first start to the last end."""
    kernels: dict[str, tuple[float, float]]
    """Name without its number -> launches and milliseconds per step; those that take most first."""

    @classmethod
    def read(cls, folder: str | Path, steps: int) -> Profile:
        """Read the trace in ``folder``.

        Args:
            folder: where :func:`traced` wrote.
            steps: how many steps were dispatched meanwhile.

        Raises:
            ValueError: there is no trace, or no device event in it.
        """
        found: list[tuple[float, float, str]] = []
        for file in Path(folder).rglob("*.xplane.pb"):
            found += _events(jax.profiler.ProfileData.from_file(str(file)))
        if not found:
            raise ValueError(f"no trace of a device in {folder}")
        found.sort()
        busy, until = 0.0, found[0][0]
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for start, duration, name in found:
            end = start + duration
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
            total = totals[re.sub(r"[._]\d+$", "", name)]
            total[0] += 1 / steps
            total[1] += duration / 1e6 / steps
        ordered = sorted(totals.items(), key=lambda item: -item[1][1])
        return cls(
            steps=steps,
            launches=len(found) / steps,
            busy_ms=busy / 1e6 / steps,
            span_ms=(until - found[0][0]) / 1e6 / steps,
            kernels={name: (count, ms) for name, (count, ms) in ordered},
        )

    def section(self) -> Section:
        """Return a table of the kernels that take most."""
        title = (
            f"{self.launches:.0f} launches per step (mean of {self.steps}), the device busy for {self.busy_ms:.2f} of "
            f"{self.span_ms:.2f} ms while traced"
        )
        shown = list(self.kernels.items())[:MOST_KERNELS]
        rows = [(name[:80], f"{count:.1f}", f"{ms:.3f} ms", f"{ms / self.busy_ms:.1%}") for name, (count, ms) in shown]
        return Section(title, ("kernel", "launches", "per step", "of busy time"), rows)


def _events(data: jax.profiler.ProfileData) -> Iterator[tuple[float, float, str]]:
    """Start and duration in nanoseconds, and name, of each kernel; on a CPU of each operation that XLA compiled."""
    gpus = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or data.planes:
        for line in plane.lines:
            if not gpus or line.name.startswith("Stream"):
                for event in line.events:
                    if gpus or any(key == "hlo_op" for key, _ in event.stats):
                        yield event.start_ns, event.duration_ns, event.name
