"""Measures what it costs to move KV between device and host, beside plain copies of the same bytes.

Three questions: how much of the plain copy's bandwidth do offload (gather, copy to pinned memory) and restore (copy
back, scatter) reach; how much slower are decode steps while transfers run; and from how many tokens on is restoring KV
faster than computing it again. Weights are random: only the shape of the model matters.

  python scripts/bench_offload.py                                 astraea-tiny's shape, up to 32k tokens
  python scripts/bench_offload.py --model=llama-3.1-8b --batch=64 --context=2048 --dtype=bfloat16    on an accelerator
  python scripts/bench_offload.py --lengths=1024,4096 --plot=out/offload.png
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from astraea_jax.engine.layout import staging_pages
from astraea_jax.engine.runner import Runner
from astraea_jax.engine.step import StepSizes
from astraea_jax.frontends.flags import engine_flags, run_main
from astraea_jax.kv_cache.arrays import FULL, page_bytes
from astraea_jax.kv_cache.offload import HostStore, has_pinned_host
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.roofline import Roofline, best_seconds
from astraea_jax.models import resolve
from astraea_jax.models.checkpoint import random_decoder
from astraea_jax.models.config import CheckpointError, ModelConfig
from astraea_jax.models.config_file import read_json
from astraea_jax.models.families import read_config
from astraea_jax.models.published import PUBLISHED
from astraea_jax.scheduler.config import SchedulerConfig
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.scheduler import Scheduler
from astraea_jax.scheduler.transfer import HostCopy, HostPages, Part, Transfer

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "astraea-tiny", f"Checkpoint folder, bundled name, or shape: {', '.join(PUBLISHED)}.")
options = engine_flags("dtype", "attention", "scan_layers", "page_size", page_size=16)
flags.DEFINE_list("lengths", ["1024", "2048", "4096", "8192", "16384", "32768"], "Tokens to restore or recompute.")
flags.DEFINE_integer("chunk", 512, "Tokens of a prefill step.", lower_bound=16)
flags.DEFINE_integer("batch", 32, "Programs that decode while transfers run.", lower_bound=1)
flags.DEFINE_integer("context", 256, "Tokens of each of them.", lower_bound=1)
flags.DEFINE_integer("steps", 64, "Decode steps of a measurement.", lower_bound=8)
flags.DEFINE_integer("repeats", 5, "Measurements; the best counts for bandwidth, the median for steps.", lower_bound=1)
flags.DEFINE_string("plot", "out/offload.png", "File for the plot of restoring against recomputing.")
define_flags("bench_offload")

console = Console()


def model_config(longest: int) -> ModelConfig:
    config = (
        PUBLISHED[FLAGS.model]
        if FLAGS.model in PUBLISHED
        else read_config(read_json(resolve(FLAGS.model) / "config.json"))
    )
    return replace(config, max_position=max(longest, config.max_position))


class Bench:
    """A scheduler and a runner as the engine has them, and pages beside them to move about."""

    def __init__(self, lengths: list[int]):
        size = FLAGS.page_size
        longest = max(*lengths, FLAGS.context + FLAGS.steps * (2 * FLAGS.repeats + 4)) + 16
        self.config = model_config(longest)
        engine = options()
        self.dtype, backend = engine.weight_dtype(), engine.backend(self.config)
        self.page_bytes = page_bytes(self.config, backend, size, self.dtype)
        running = FLAGS.batch * -(-(FLAGS.context + FLAGS.steps * (2 * FLAGS.repeats + 4)) // size)
        pages = 1 + max(running, -(-longest // size))
        self.spare = range(pages, pages + -(-max(lengths) // size))
        """Pages that the scheduler knows nothing of."""
        sizes: dict[str, Any] = {
            "page_size": size,
            "max_seqs": FLAGS.batch,
            "max_step_tokens": max(FLAGS.chunk, FLAGS.batch),
        }
        decoder = random_decoder(self.config, self.dtype, seed=0)
        if engine.stacks():
            decoder.stack()
        self.staging = staging_pages(pages, size)
        self.runner = Runner(
            decoder,
            backend,
            StepSizes(
                num_pages=pages + len(self.spare), max_pages_per_seq=-(-longest // size), kv_dtype=self.dtype, **sizes
            ),
            staging=self.staging,
        )
        self.scheduler = Scheduler(SchedulerConfig(num_pages=pages, max_context=longest, **sizes), make_policy("fcfs"))
        self.store = HostStore(self.runner, self.runner.block_sharding, self.staging)

    def steps(self) -> Iterator[float]:
        """Run the engine's loop until nothing is left to do; the seconds of each step as it ends."""
        before, last = None, time.perf_counter()
        while True:
            plan = self.scheduler.plan(last)
            step = None if plan is None else self.runner.dispatch(plan)
            if before is not None:
                self.scheduler.commit(before.plan, self.runner.read(before), last)
                now = time.perf_counter()
                yield now - last
                last = now
            if step is None and before is None:
                return
            before = step

    def prefill_s(self, tokens: int) -> float:
        """Seconds to compute the KV of a prompt, alone."""
        self.scheduler.submit([i % self.config.vocab_size for i in range(tokens)], 1, now=0.0)
        began = time.perf_counter()
        for _ in self.steps():
            pass
        return time.perf_counter() - began

    def move(self, transfer: Transfer) -> float:
        """Seconds of one transfer, alone."""
        began = time.perf_counter()
        self.store.start([transfer], [])
        while self.store.busy:
            for _, failed in self.store.poll():
                if failed:
                    raise SystemExit("a transfer failed; its reason is above")
        self.runner.gather([0], FULL).block_until_ready()  # until the last scatter is through
        return time.perf_counter() - began

    def round_trip(self, pages: int) -> tuple[float, float]:
        """Seconds to the host and back."""
        there, back = self.transfers(pages)
        took = self.move(there), self.move(back)
        self.store.start([], [there.parts[0].copy.memory])
        return took

    def transfers(self, pages: int) -> tuple[Transfer, Transfer]:
        program, copy = Program(0, 0.0), HostCopy(0, pages, HostPages(pages))
        ids, parts = tuple(self.spare[:pages]), (Part(copy, 0, pages),)
        return Transfer(program, ids, parts, True, 0.0), Transfer(program, ids, parts, False, 0.0)

    def plain(self, pages: int) -> tuple[float, float]:
        """Shortest times of ``device_put`` of as many bytes in one array, to pinned memory and back."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        there = jnp.ones(pages * self.page_bytes // self.dtype.itemsize, self.dtype)
        back = jax.device_put(there, device.with_memory_kind("pinned_host"))
        return (
            best_seconds(lambda: jax.device_put(there, back.sharding), FLAGS.repeats, queued=1),
            best_seconds(lambda: jax.device_put(back, device), FLAGS.repeats, queued=1),
        )

    def decode_ms(self, progress: Callable[[], None]) -> tuple[float, float]:
        """Median milliseconds of a decode step, alone and while KV is offloaded and restored all the time.

        Both are measured in turns, since the machine's speed drifts.
        """
        tokens = FLAGS.steps * (2 * FLAGS.repeats + 2)
        for i in range(FLAGS.batch):
            self.scheduler.submit([i % self.config.vocab_size] * FLAGS.context, tokens, now=0.0)
        steps = self.steps()
        for _ in range(FLAGS.batch * FLAGS.context // FLAGS.chunk + FLAGS.steps):
            next(steps)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(FLAGS.repeats):
            for moving in (False, True):
                times[moving].append(self._decode(steps, moving))
            progress()
        for _ in steps:
            pass
        return 1e3 * float(np.median(times[0])), 1e3 * float(np.median(times[1]))

    def _decode(self, steps: Iterator[float], moving: bool) -> float:
        """Mean seconds of a step."""
        total, pages = 0.0, min(self.staging, len(self.spare))
        there, back = self.transfers(pages)
        turn = 0
        for _ in range(FLAGS.steps):
            if moving and not self.store.busy:
                self.store.start([(there, back)[turn % 2]], [])
                turn += 1
            total += next(steps)
            self.store.poll()
        while self.store.busy:
            self.store.poll()
        self.store.start([], [there.parts[0].copy.memory])
        return total / FLAGS.steps


def measure(bench: Bench, lengths: list[int]) -> dict[str, Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=None)
        bench.runner.compile(lambda done, total: bar.update(task, completed=done, total=total))
        task = bar.add_task("measuring", total=2 * len(lengths) + FLAGS.repeats + 1)
        advance = lambda: bar.advance(task)  # noqa: E731
        bench.prefill_s(lengths[0])  # to warm up
        resume = []
        for tokens in lengths:
            pages = -(-tokens // FLAGS.page_size)
            offload_s, restore_s = map(min, zip(*(bench.round_trip(pages) for _ in range(FLAGS.repeats)), strict=True))
            advance()
            recompute_s = bench.prefill_s(tokens)
            advance()
            resume.append(
                {"tokens": tokens, "offload_s": offload_s, "restore_s": restore_s, "recompute_s": recompute_s}
            )
        pages = -(-lengths[-1] // FLAGS.page_size)
        plain_out, plain_in = bench.plain(pages)
        advance()
        alone_ms, moving_ms = bench.decode_ms(advance)
    moved = pages * bench.page_bytes
    return {
        "bytes": moved,
        "plain_out_gb_s": moved / plain_out / 1e9,
        "plain_in_gb_s": moved / plain_in / 1e9,
        "offload_gb_s": moved / resume[-1]["offload_s"] / 1e9,
        "restore_gb_s": moved / resume[-1]["restore_s"] / 1e9,
        "decode_ms": alone_ms,
        "decode_while_moving_ms": moving_ms,
        "resume": resume,
    }


def sections(figures: dict[str, Any], dtype: str) -> list[Section]:
    f = figures
    rows = []
    for name, ours, plain in (("offload", "offload", "plain_out"), ("restore", "restore", "plain_in")):
        rate, floor = f[f"{ours}_gb_s"], f[f"{plain}_gb_s"]
        rows.append((name, f"{rate:.2f} GB/s", f"{floor:.2f} GB/s", f"{rate / floor:.0%}"))
    slower = f["decode_while_moving_ms"] / f["decode_ms"] - 1
    rows.append((f"decode step, {FLAGS.batch} programs", f"{f['decode_ms']:.2f} ms", "", ""))
    rows.append(("  while KV moves", f"{f['decode_while_moving_ms']:.2f} ms", "", f"{slower:+.1%}"))
    back = [
        (
            f"{row['tokens']:,}",
            f"{1e3 * row['restore_s']:.1f} ms",
            f"{1e3 * row['recompute_s']:.0f} ms",
            f"{row['recompute_s'] / row['restore_s']:.0f}x",
        )
        for row in f["resume"]
    ]
    title = f"{FLAGS.model}'s KV in {dtype}, {f['bytes'] / 2**20:,.0f} MiB, pages of {FLAGS.page_size}"
    return [
        Section(title, ("", "measured", "plain device_put", "share"), rows),
        Section("Coming back to a context", ("tokens", "from the host", "computed again", "faster by"), back),
    ]


def main(_: list[str]) -> None:
    try:
        lengths = sorted({int(x) for x in FLAGS.lengths})
    except ValueError:
        raise app.UsageError(f"--lengths: {FLAGS.lengths} are not all whole numbers") from None
    if not lengths or lengths[0] < 1:
        raise app.UsageError("--lengths: at least one is needed, all above 0")
    if not has_pinned_host():
        raise SystemExit("cannot measure: this backend cannot pin host memory")
    roofline = Roofline.measure(options().weight_dtype())
    try:
        bench = Bench(lengths)
    except CheckpointError as error:
        raise SystemExit(f"cannot measure: {error}") from None
    figures = measure(bench, lengths)
    publish("bench_offload", sections(figures, bench.dtype.name), figures, roofline, console=console)
    if FLAGS.plot:
        from astraea_jax.lab.plots import resumes

        Path(FLAGS.plot).parent.mkdir(parents=True, exist_ok=True)
        resumes(figures["resume"], Path(FLAGS.plot), f"{FLAGS.model}'s shape on {jax.devices()[0].device_kind}")
        console.print(f"picture: {FLAGS.plot}")


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
