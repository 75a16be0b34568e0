"""Measures what Ray Serve's front costs beside our own doors, and what agents see of a replica that is killed.

The same agents run against `astraea-jax serve` and against one replica behind Serve's proxies, through HTTP and gRPC,
in turns, while both servers are up; a ratio is that of the medians of all rounds. Then agents that send failed requests
again run against two replicas, of which one is killed when a third of them has ended.

  python scripts/bench_ray.py
  python scripts/bench_ray.py --agents=32 --rounds=1
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags

from astraea_jax.errors import StartupError
from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.ray_fleet import Ended, Fleet, local_fleet, run_agents
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.shop import Task, make_tasks

FLAGS = flags.FLAGS
flags.DEFINE_integer("agents", 128, "Agents at once.", lower_bound=3)
flags.DEFINE_integer("rounds", 3, "Times that every way is measured, in turns; 0: never.", lower_bound=0)
flags.DEFINE_bool("kill", True, "Also kill a replica.")
flags.DEFINE_integer("attempts", 120, "Times that a request is sent at most, half a second apart.", lower_bound=1)
flags.DEFINE_float("limit_s", 120.0, "Seconds after which agents count as hung.")
define_flags("bench_ray")

ENGINE = {"max_seqs": 64, "max_step_tokens": 512, "kv_bytes": 64 * 2**20, "max_context": 1024}
DOORS = {"HTTP": True, "gRPC": False}


@dataclass(frozen=True)
class Round:
    """All agents, once."""

    ended: Sequence[Ended]
    took_s: float

    @property
    def ttft_ms(self) -> np.ndarray:
        """Milliseconds to the first token, of every request."""
        requests = [request for each in self.ended for request in each.result.requests]
        return np.array([1e3 * (request.first_token - request.submitted) for request in requests])

    @property
    def jct_s(self) -> float:
        """Mean seconds of an agent."""
        spans = [each.result.requests[-1].ended - each.result.requests[0].submitted for each in self.ended]
        return float(np.mean(spans))

    @property
    def right(self) -> int:
        """Agents with the right answer."""
        return sum(each.right for each in self.ended)


@contextmanager
def own_server() -> Iterator[Fleet]:
    """Run `astraea-jax serve`, as operators do."""
    options = [f"--{name}={value}" for name, value in ENGINE.items()]
    command = [str(Path(sys.executable).with_name("astraea-jax")), "serve", "--port=0", "--http_port=0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        while not (ready := re.search(r"ready on (\S+)", said)):
            line = process.stderr.readline()
            if not line:
                raise StartupError(f"the server has ended before it was ready:\n{said}")
            said += line
        url = re.search(r"HTTP: (\S+),", said)
        assert url is not None
        yield Fleet(url[1], ready[1])
    finally:
        process.terminate()
        process.wait(60)


def measure(fleet: Fleet, tasks: Sequence[Task], *, http: bool) -> Round:
    """Run all agents once."""

    async def run() -> list[Ended]:
        async with asyncio.timeout(FLAGS.limit_s):
            return await run_agents(fleet, tasks, http=http)

    began = time.monotonic()
    return Round(asyncio.run(run()), time.monotonic() - began)


def compare(tasks: Sequence[Task]) -> Section:
    """Run the agents every way, in turns."""
    found: dict[tuple[str, str], list[Round]] = {}
    with own_server() as own, local_fleet(1, ENGINE) as served:
        for fleet in (own, served):
            measure(fleet, tasks[:8], http=True)  # what is imported late, is now
        for _ in range(FLAGS.rounds):
            for door, http in DOORS.items():
                for front, fleet in (("our own", own), ("Ray Serve", served)):
                    found.setdefault((door, front), []).append(measure(fleet, tasks, http=http))
    return Section(
        f"{len(tasks)} agents on one engine of astraea-tiny, by the front they come through; medians of {FLAGS.rounds}",
        ("door", "front", "right", "TTFT P50, ms", "TTFT P99, ms", "mean JCT, s", "JCT by our own"),
        [_row(door, front, rounds, found[door, "our own"]) for (door, front), rounds in found.items()],
        named=2,
    )


def _row(door: str, front: str, rounds: Sequence[Round], own: Sequence[Round]) -> tuple[str, ...]:
    jct_s, own_s = (float(np.median([each.jct_s for each in of])) for of in (rounds, own))
    quantiles = (float(np.median([np.quantile(each.ttft_ms, q) for each in rounds])) for q in (0.5, 0.99))
    right = min(each.right for each in rounds)
    figures = (*(f"{value:.0f}" for value in quantiles), f"{jct_s:.2f}", f"{jct_s / own_s:.2f}")
    return (door, front, f"{right} of {len(rounds[0].ended)}", *figures)


def kill_one(tasks: Sequence[Task]) -> tuple[Section, Mapping[str, int]]:
    """Run the agents on two replicas, and kill one of them; returns a table, and wrong answers by door."""
    rows, wrong = [], {}
    with local_fleet(2, ENGINE) as fleet:
        for door, http in DOORS.items():
            while len(before := fleet.replicas()) < 2:
                time.sleep(0.5)
            ended, killed_s, took_s = asyncio.run(_while_killed(fleet, before[0], tasks, http=http))
            wrong[door] = len(tasks) - sum(each.right for each in ended)
            rows.append((door, f"{len(tasks) - wrong[door]} of {len(tasks)}", f"{killed_s:.1f}", f"{took_s:.1f}"))
    columns = ("door", "right", "killed after, s", "all ended after, s")
    return Section(f"{len(tasks)} agents on two replicas, one of which is killed", columns, rows), wrong


async def _while_killed(
    fleet: Fleet, victim: str, tasks: Sequence[Task], *, http: bool
) -> tuple[Sequence[Ended], float, float]:
    """Run the agents, and kill a replica meanwhile; returns them, and the seconds until the kill and until the end."""
    began, killed_s = time.monotonic(), 0.0

    def kill(count: int) -> None:
        nonlocal killed_s
        if count == len(tasks) // 3:
            fleet.kill(victim)
            killed_s = time.monotonic() - began

    async with asyncio.timeout(FLAGS.limit_s):
        ended = await run_agents(fleet, tasks, http=http, attempts=FLAGS.attempts, ended=kill)
    return ended, killed_s, time.monotonic() - began


def main(_: list[str]) -> None:
    tasks = make_tasks(seed=1, split="test", count=FLAGS.agents)
    sections = [compare(tasks)] if FLAGS.rounds else []
    wrong: Mapping[str, int] = {}
    if FLAGS.kill:
        killed, wrong = kill_one(tasks)
        sections.append(killed)
    publish("bench_ray", sections, {"wrong after a kill": dict(wrong)})


def run() -> None:
    run_main(main, __name__)
