"""Measures what scheduling costs: microseconds of `plan` and `commit` per step, with many programs waiting.

256 requests run, and from 1,000 to 10,000 more wait for memory; every step one request ends and one arrives, so that
every plan has a request to admit. No device is involved: this is the host's work alone.

Beside it stands the time of the residency manager per event, with as many programs that wait for their tools and hold
KV: when one begins to wait, when pages are copied to the host ahead of need, when pages are needed, and when a transfer
ends.

  python scripts/bench_scheduler.py
  python scripts/bench_scheduler.py --policies=astraea,plas,hrrn --waiting=1000,100000
  python scripts/bench_scheduler.py --policies=astraea --caching=told     what KV events cost, beside --caching=cached
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from absl import flags

from astraea_jax.engine.kv_events import KVEvents
from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.scheduler.config import SchedulerConfig
from astraea_jax.scheduler.evictor import Need
from astraea_jax.scheduler.pages import PagePool
from astraea_jax.scheduler.policies import SERVING, make_policy
from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import Program, Request
from astraea_jax.scheduler.residency import Residency
from astraea_jax.scheduler.scheduler import Scheduler
from astraea_jax.scheduler.strategies import STRATEGIES, make_strategy
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.windows import Window

FLAGS = flags.FLAGS
flags.DEFINE_list("policies", SERVING, "Policies to time.")
flags.DEFINE_list("strategies", ["adaptive"], f"Residency strategies to time, of {', '.join(STRATEGIES)}.")
flags.DEFINE_list("waiting", ["1000", "3000", "10000"], "Requests that wait.")
flags.DEFINE_integer("running", 256, "Requests that run.", lower_bound=1)
flags.DEFINE_integer("tenants", 1, "Tenants of these requests.", lower_bound=1)
flags.DEFINE_integer(
    "window", 0, "Tokens that a query sees in layers with a window; 0: no layer has one.", lower_bound=0
)
flags.DEFINE_enum(
    "caching",
    "off",
    ["off", "cached", "told"],
    "Whether full pages are put into the prefix cache, every prompt another one, and told as KV events as well.",
)
flags.DEFINE_integer("steps", 400, "Steps to measure.", lower_bound=10)
define_flags("bench_scheduler")


def measure(name: str, waiting: int) -> tuple[float, float, float]:
    """Median microseconds of a plan, of a commit, and the 99th percentile of both together."""
    rng = random.Random(0)
    running, window = FLAGS.running, None
    if FLAGS.window:
        window = Window(FLAGS.window, 1 + 2048 // 16 + running * (Window(FLAGS.window, 0).span(16) + 2))
    config = SchedulerConfig(
        num_pages=running * 40 + 1,
        page_size=16,
        max_seqs=running,
        max_step_tokens=2048,
        max_context=1024,
        max_waiting=10**7,
        max_programs=10**7,
        window=window,
        kv_events=FLAGS.caching == "told",
    )
    scheduler = Scheduler(config, make_policy(name))
    now, salt = 0.0, None if FLAGS.caching == "off" else salted("")
    events = None if scheduler.kv_log is None else KVEvents(scheduler.kv_log)
    starts = itertools.count() if salt else itertools.repeat(0)

    def arrive() -> None:
        start = next(starts)
        prompt, output = range(start, start + rng.randint(100, 500)), rng.randint(2, 400)
        owner = rng.randrange(FLAGS.tenants) if FLAGS.tenants > 1 else 0
        scheduler.submit(prompt, output, owner=owner, salt=salt, now=now)

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
            scheduler.commit(before, [1] * before.samples, now)
        if events is not None:
            events.collect()
        if step >= 200:
            plans.append(1e6 * (planned - began))
            commits.append(1e6 * (time.perf_counter() - planned))
        if events is not None:
            events.get(0)
        before = plan
    both = np.array(plans) + np.array(commits)
    return float(np.median(plans)), float(np.median(commits)), float(np.percentile(both, 99))


def measure_residency(name: str, waiting: int) -> dict[str, float]:
    """Median microseconds of each event, with so many programs in a tool wait, eight pages each."""
    pool = PagePool(8 * waiting + 1)
    host = HostTier(pages=16 * waiting, staging=256)
    residency = Residency(pool, 16, host, make_strategy(name, Predictor()), lambda program: None)
    times: dict[str, list[float]] = {
        "a wait begins": [],
        "copies ahead": [],
        "32 pages are needed": [],
        "a transfer ends": [],
    }

    def timed(event: str, run: Callable[[], object]) -> None:
        began = time.perf_counter()
        run()
        times[event].append(1e6 * (time.perf_counter() - began))

    def wait(number: int, now: float) -> Program:
        program = Program(number, now, wait_began=now)
        request = Request(number, program, range(128), 1, frozenset(), False, now, page_size=16)
        residency.retain(program, request, pool.allocate(8), 128)
        return program

    def settle(now: float) -> bool:
        begun, _ = residency.take_transfers()
        for transfer in begun:
            timed("a transfer ends", partial(residency.transfer_ended, transfer, now))
        return bool(begun)

    for number in range(waiting):
        wait(number, number * 1e-3)
    residency.evictor.offload_ahead(waiting)
    while settle(waiting):  # until as much is copied as is to be copied ahead
        residency.evictor.offload_ahead(waiting)
    for step in range(FLAGS.steps):
        now = waiting + 0.02 * step
        timed("32 pages are needed", partial(residency.evictor.evict, Need(32, 0, wait=True), now))
        settle(now)
        if pool.free >= 8:
            timed("a wait begins", partial(residency.wait_begins, wait(waiting + step, now), now))
        timed("copies ahead", partial(residency.evictor.offload_ahead, now))
        settle(now)
    return {event: float(np.median(found or [0.0])) for event, found in times.items()}


def of_residency(counts: list[int]) -> tuple[Section, list[dict[str, float | str | int]]]:
    table, rows = [], []
    for name in FLAGS.strategies:
        found = [measure_residency(name, waiting) for waiting in counts]
        table += [(name, event, *(f"{figures[event]:.0f}" for figures in found)) for event in found[0]]
        rows += [{"strategy": name, "waiting": n, **figures} for n, figures in zip(counts, found, strict=True)]
    columns = ("strategy", "event", *(f"{waiting:,} waiting" for waiting in counts))
    return Section("Microseconds per event of the residency manager, medians", columns, table, named=2), rows


def of_policies(counts: list[int]) -> tuple[Section, list[dict[str, float | str | int]]]:
    table, rows = [], []
    for name in FLAGS.policies:
        cells = []
        for waiting in counts:
            plan, commit, worst = measure(name, waiting)
            rows.append({"policy": name, "waiting": waiting, "plan_us": plan, "commit_us": commit, "p99_us": worst})
            cells.append(f"{plan:.0f} + {commit:.0f} ({worst:.0f})")
        table.append((name, *cells))
    title = f"Microseconds per step, {FLAGS.running} running: plan + commit, medians (99th percentile)"
    return Section(title, ("policy", *(f"{waiting:,} waiting" for waiting in counts)), table), rows


def main(_: list[str]) -> None:
    counts = [int(waiting) for waiting in FLAGS.waiting]
    policies, rows = of_policies(counts)
    events, event_rows = of_residency(counts)
    publish("bench_scheduler", [policies, events], {"rows": rows, "residency": event_rows})


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
