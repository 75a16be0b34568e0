"""What scheduling costs: microseconds of `plan` and `commit` per step, with many programs waiting.

256 segments run, and from 1,000 to 10,000 more wait for memory; every step one segment ends and one arrives, so that
every plan has somebody to admit. No device: this is the host's work alone.

  python scripts/bench_scheduler.py
  python scripts/bench_scheduler.py --policies=astraea,plas,hrrn --waiting=1000,100000
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from astraea_jax.scheduler.config import SchedulerConfig
from astraea_jax.scheduler.policies import SERVING, make_policy
from astraea_jax.scheduler.scheduler import Scheduler

FLAGS = flags.FLAGS
flags.DEFINE_list("policies", SERVING, "Policies to time.")
flags.DEFINE_list("waiting", ["1000", "3000", "10000"], "Segments that wait.")
flags.DEFINE_integer("running", 256, "Segments that run.", lower_bound=1)
flags.DEFINE_integer("steps", 400, "Steps to measure.", lower_bound=10)
flags.DEFINE_string("json", None, "Also write the figures to this file.")


def measure(name: str, waiting: int) -> tuple[float, float, float]:
    """Median microseconds of a plan, of a commit, and the 99th percentile of both together."""
    rng = random.Random(0)
    running = FLAGS.running
    config = SchedulerConfig(
        num_pages=running * 40 + 1,
        page_size=16,
        max_seqs=running,
        max_step_tokens=2048,
        max_context=1024,
        max_waiting=10**7,
        max_programs=10**7,
    )
    scheduler = Scheduler(config, make_policy(name))
    now = 0.0

    def arrive() -> None:
        scheduler.submit(range(rng.randint(100, 500)), rng.randint(2, 400), now=now)

    for _ in range(running + waiting):
        arrive()
    plans, commits, before = [], [], None
    for step in range(FLAGS.steps + 200):
        now += 0.02
        while scheduler.stats().waiting < waiting:
            arrive()
        began = time.perf_counter()
        plan = scheduler.plan(now)
        planned = time.perf_counter()
        if before is not None:
            scheduler.commit(before, [1] * len(before.rows), now)
        if step >= 200:
            plans.append(1e6 * (planned - began))
            commits.append(1e6 * (time.perf_counter() - planned))
        before = plan
    both = np.array(plans) + np.array(commits)
    return float(np.median(plans)), float(np.median(commits)), float(np.percentile(both, 99))


def main(_: list[str]) -> None:
    table = Table(title=f"Microseconds per step, {FLAGS.running} running: plan + commit, medians (99th percentile)")
    table.add_column("policy")
    for waiting in FLAGS.waiting:
        table.add_column(f"{int(waiting):,} waiting", justify="right")
    rows = []
    for name in FLAGS.policies:
        cells = []
        for waiting in map(int, FLAGS.waiting):
            plan, commit, worst = measure(name, waiting)
            rows.append({"policy": name, "waiting": waiting, "plan_us": plan, "commit_us": commit, "p99_us": worst})
            cells.append(f"{plan:.0f} + {commit:.0f} ({worst:.0f})")
        table.add_row(name, *cells)
    Console(width=max(100, Console().width)).print(table)
    if FLAGS.json:
        Path(FLAGS.json).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    app.run(main)
