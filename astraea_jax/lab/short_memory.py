"""Recorded agents on one real engine whose memory is short: scheduled as engines do today, and as here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from astraea_jax.engine.config import EngineConfig
from astraea_jax.lab.engine_study import Pair, Study, named, tables
from astraea_jax.lab.plots import replays
from astraea_jax.lab.replay import Replayed, Replayer
from astraea_jax.scheduler.simulation.experiment import Cell

MODEL = "tiny-32k"
"""Shape of the model, with random weights: what it writes does not matter here."""
WAYS = (("fcfs", "keep-lru"), ("astraea", "host"))
"""Policies and residencies: requests in order of arrival, whose evicted KV is computed again; and the default here."""


@dataclass(frozen=True)
class Shortage:
    """Recorded coding sessions whose contexts are some times as large as the device's memory."""

    programs: int = 32
    seeds: int = 2
    """Draws of programs, each of which runs once in either way."""
    context: int = 4096
    """Tokens that lengths are scaled to fit in."""
    oversubscription: float = 2.5
    load: float = 2.0
    """Share of what the engine works off with unlimited memory that arrives."""
    tool_scale: float = 0.01
    run_limit_s: float = 25.0
    """Seconds after which a run is cut off."""

    def cells(self) -> list[Cell]:
        """Runs; those of the same programs stand together."""
        return [
            Cell(
                *("claude-code", policy, "online", residency, self.oversubscription, seed, self.programs, self.load),
                *(f"{MODEL} here", self.context, self.tool_scale),
            )
            for seed in range(self.seeds)
            for policy, residency in WAYS
        ]


def replay_both_ways(shortage: Shortage, console: Console, picture: Path) -> None:
    """Run the sessions both ways on the same compiled steps, print a table and draw a picture.

    The order of the two turns from seed to seed.
    """
    config = EngineConfig(
        max_seqs=16, max_step_tokens=256, max_queued=1024, max_context=shortage.context, kv_bytes=128 * 2**20
    )
    replayer = Replayer(MODEL, config)
    with console.status("compiling"):
        replayer.compile()
    runs = Study(replayer, console, run_limit_s=shortage.run_limit_s).run(shortage.cells())
    runs.sort(key=lambda run: (run.cell.seed, WAYS.index((run.cell.policy, run.cell.residency))))
    for section in tables([Pair(run, None) for run in runs]):
        console.print(section.table())
    found: dict[str, list[Replayed]] = {}
    for run in runs:
        found.setdefault(named(run.cell), []).append(run.replayed)
    title = f"{shortage.programs} recorded agents, device memory for {runs[0].setting.pool_tokens:,} tokens of KV"
    replays(found, picture, title)
