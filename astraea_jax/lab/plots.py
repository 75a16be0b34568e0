"""Plots of programs (needs matplotlib, in the ``demo`` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from astraea_jax.agents.loop import ProgramResult, RequestRecord
from astraea_jax.lab.replay import Replayed
from astraea_jax.scheduler.simulation.simulator import ProgramRecord

COLOURS = {"queue": "#d9d9d9", "prefill": "#e6843c", "decode": "#2f6fb0", "tool wait": "#a5d6a1"}
COLOURS_OF_LINES = [mpl.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2)) if i not in (6, 7)]
"""Strong ones before pale ones, which are the same hues; red is for astraea."""
Span = tuple[float, float]
"""(start, length) in seconds."""
Lines = Mapping[str, Sequence[tuple[float, float, float, float]]]
"""By policy: points (x, mean, low, high)."""


def spans(requests: Sequence[RequestRecord]) -> dict[str, list[Span]]:
    """Spans of a program's time, by kind. A request without the server's usage counts as decode."""
    found: dict[str, list[Span]] = {kind: [] for kind in COLOURS}
    for request in requests:
        at = request.submitted
        if request.usage is not None:
            for kind, length in (("queue", request.usage.queue_s), ("prefill", request.usage.prefill_s)):
                found[kind].append((at, length))
                at += length
        found["decode"].append((at, max(request.ended - at, 0.0)))
        if request.tools:
            found["tool wait"].append((request.ended, max(run.ended for run in request.tools) - request.ended))
    return found


def timelines(programs: Sequence[ProgramResult], path: Path, title: str) -> None:
    """Draw one bar per program in order of arrival, coloured by queueing, prefill, decode and tool waits."""
    ordered = sorted(programs, key=lambda program: program.requests[0].submitted)
    _bars([spans(program.requests) for program in ordered], ordered[0].requests[0].submitted, path, title)


def simulated_timelines(records: Sequence[ProgramRecord], path: Path, title: str) -> None:
    """Draw :func:`timelines` of simulated or replayed programs."""
    _bars([spans_of(record) for record in sorted(records, key=lambda record: record.arrival)], 0.0, path, title)


def spans_of(record: ProgramRecord) -> dict[str, list[Span]]:
    """Spans of the time of a simulated or replayed program, by kind."""
    found: dict[str, list[Span]] = {kind: [] for kind in COLOURS}
    for i, (submitted, scheduled, first, ended) in enumerate(record.spans):
        found["queue"].append((submitted, scheduled - submitted))
        found["prefill"].append((scheduled, first - scheduled))
        found["decode"].append((first, ended - first))
        found["tool wait"].append((ended, min(record.program.requests[i].tool_s, max(record.ended - ended, 0.0))))
    return found


def replays(runs: Mapping[str, Sequence[Replayed]], path: Path, title: str) -> None:
    """Draw how the same programs fare under several policies: timelines of the first seed, and completions of all.

    ``runs`` has by policy the run of every seed.
    """
    height = max(2.0, 0.1 * max(len(seeds[0].outcome.records) for seeds in runs.values()))
    figure, panels = plt.subplots(
        len(runs) + 1, 1, figsize=(12, height * (len(runs) + 1)), layout="constrained", sharex=True
    )
    for axes, (name, seeds) in zip(panels, runs.items(), strict=False):
        records = sorted(seeds[0].outcome.records, key=lambda record: record.arrival)
        _draw_bars(axes, [spans_of(record) for record in records], 0.0)
        cut = f", cut off after {seeds[0].outcome.makespan_s:.0f} s" if seeds[0].cut else ""
        axes.set(ylabel="program", title=name + cut)
    for index, (name, seeds) in enumerate(runs.items()):
        for number, replayed in enumerate(seeds):
            records = replayed.outcome.records
            ends = sorted(record.ended for record in records)[: len(records) - replayed.cut]
            label = f"{name}, every seed" if number == 0 else None
            panels[-1].step([0.0, *ends], range(len(ends) + 1), where="post", label=label, **_style(name, index))
    panels[-1].set(xlabel="seconds", ylabel="programs that ended")
    panels[-1].set_xlim(left=0)
    panels[-1].grid(alpha=0.3)
    panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.legend(*_kinds(), ncols=len(COLOURS), loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def distributions(jct: Mapping[str, Sequence[float]], path: Path, title: str) -> None:
    """Draw the cumulative distribution of job completion times, a line per policy."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, (name, values) in enumerate(jct.items()):
        share = [(k + 1) / len(values) for k in range(len(values))]
        axes.plot(sorted(values), share, label=name, **_style(name, i))
    axes.set(xlabel="job completion time, s", ylabel="share of programs", title=title, xscale="log", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def sweep(
    lines: Lines,
    path: Path,
    title: str,
    over: str = "KV oversubscription",
    hits: Lines | None = None,
) -> None:
    """Draw mean completion times over something, with a band; and below, if given, shares of prompts found computed."""
    figure, panels = plt.subplots(
        1 + bool(hits), 1, figsize=(8, 5 + 3 * bool(hits)), layout="constrained", sharex=True, squeeze=False
    )
    axes = panels[0, 0]
    _draw_lines(axes, lines)
    axes.set(ylabel="mean job completion time, s", title=title, yscale="log")
    for of in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        of("{x:.0f}")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    if hits:
        _draw_lines(panels[1, 0], hits)
        panels[1, 0].set(ylabel="prompt tokens found computed")
        panels[1, 0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[-1, 0].set_xlabel(over)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_lines(axes: Axes, lines: Lines) -> None:
    for i, (name, points) in enumerate(lines.items()):
        x, mean, low, high = zip(*points, strict=True)
        style = _style(name, i)
        axes.plot(x, mean, marker="o", markersize=3, label=name, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set_xticks(sorted({x for points in lines.values() for x, *_ in points}))
    axes.grid(alpha=0.3, which="both")


def resumes(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw the time to resume a context over its length: restored from the host, or recomputed.

    ``rows`` have ``tokens``, ``restore_s`` and ``recompute_s``.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    for key, label, colour in (
        ("recompute_s", "recomputed", COLOURS["prefill"]),
        ("restore_s", "restored from the host", COLOURS["decode"]),
    ):
        axes.plot(tokens, [1e3 * row[key] for row in rows], marker="o", label=label, color=colour)
    cheaper = [row["tokens"] for row in rows if row["restore_s"] < row["recompute_s"]]
    if cheaper:
        axes.axvline(cheaper[0], color="#555555", linewidth=1, linestyle="--")
        note = "restoring is faster from here on, at the latest"
        axes.annotate(note, (cheaper[0], axes.get_ylim()[1]), (4, -10), textcoords="offset points", fontsize=8)
    axes.set(xlabel="tokens of context", ylabel="milliseconds", title=title, xscale="log", yscale="log")
    axes.set_xticks(tokens, [f"{n:,.0f}" for n in tokens])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(name: str, index: int) -> dict[str, Any]:
    if name.startswith("astraea") and "paper" not in name:
        return {"color": "#c62828", "linewidth": 2.4, "zorder": 5}
    if "clairvoyant" in name or "unlimited" in name or name == "pooled":
        return {"color": "#555555", "linewidth": 1.4, "linestyle": "--"}
    return {"color": COLOURS_OF_LINES[index % len(COLOURS_OF_LINES)], "linewidth": 1.3}


def _bars(rows: Sequence[Mapping[str, Sequence[Span]]], zero: float, path: Path, title: str) -> None:
    figure, axes = plt.subplots(figsize=(12, max(4.0, 1.5 + 0.08 * len(rows))), layout="constrained")
    _draw_bars(axes, rows, zero)
    axes.set(xlabel="seconds", ylabel="program", title=title)
    axes.set_xlim(left=0)
    figure.legend(*_kinds(), ncols=len(COLOURS), loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_bars(axes: Axes, rows: Sequence[Mapping[str, Sequence[Span]]], zero: float) -> None:
    for row, kinds in enumerate(rows):
        for kind, found in kinds.items():
            shifted = [(start - zero, length) for start, length in found]
            axes.broken_barh(shifted, (row - 0.42, 0.84), facecolors=COLOURS[kind], linewidth=0)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _kinds() -> tuple[list[Patch], list[str]]:
    """Handles and labels of a legend of the colours."""
    return [Patch(color=colour) for colour in COLOURS.values()], list(COLOURS)
