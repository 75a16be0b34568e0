"""Pictures of programs (needs matplotlib: the ``demo`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from astraea_jax.agent import ProgramResult, SegmentRecord

COLOURS = {"queue": "#d9d9d9", "prefill": "#e6843c", "decode": "#2f6fb0", "tool wait": "#a5d6a1"}
Span = tuple[float, float]
"""(start, length) in seconds."""


def spans(segments: Sequence[SegmentRecord]) -> dict[str, list[Span]]:
    """Where a program's time went, by kind. Without the server's usage a segment counts as decode."""
    found: dict[str, list[Span]] = {kind: [] for kind in COLOURS}
    for segment in segments:
        at = segment.submitted
        if segment.usage is not None:
            for kind, length in (("queue", segment.usage.queue_s), ("prefill", segment.usage.prefill_s)):
                found[kind].append((at, length))
                at += length
        found["decode"].append((at, max(segment.ended - at, 0.0)))
        if segment.tools:
            found["tool wait"].append((segment.ended, max(run.ended for run in segment.tools) - segment.ended))
    return found


def timelines(programs: Sequence[ProgramResult], path: Path, title: str) -> None:
    """Draw one bar per program, in order of arrival: when it queued, was prefilled, decoded and waited for a tool."""
    ordered = sorted(programs, key=lambda program: program.segments[0].submitted)
    zero = ordered[0].segments[0].submitted
    figure, axes = plt.subplots(figsize=(12, max(4.0, 1.5 + 0.08 * len(ordered))), layout="constrained")
    for row, program in enumerate(ordered):
        for kind, found in spans(program.segments).items():
            shifted = [(start - zero, length) for start, length in found]
            axes.broken_barh(shifted, (row - 0.42, 0.84), facecolors=COLOURS[kind], linewidth=0)
    axes.set(xlabel="seconds", ylabel="program", title=title, ylim=(len(ordered) - 0.5, -0.5))
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    patches = [Patch(color=colour) for colour in COLOURS.values()]
    figure.legend(patches, list(COLOURS), ncols=len(COLOURS), loc="outside lower center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
