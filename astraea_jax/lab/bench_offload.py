"""Measures what it costs to move KV between device and host, beside plain copies of the same bytes.

Four questions: how much of the plain copy's bandwidth do offload (gather, copy to pinned memory) and restore (copy
back, scatter) reach; how much slower are decode steps while transfers run; how long transfers hold up the serving loop,
whose calls they are; and from how many tokens on is restoring KV faster than computing it again. Weights are random:
only the shape of the model matters.

  python scripts/bench_offload.py                                 astraea-tiny's shape, up to 32k tokens
  python scripts/bench_offload.py --model=llama-3.1-8b --batch=64 --context=2048 --dtype=bfloat16    on an accelerator
  python scripts/bench_offload.py --lengths=1024,4096 --plot=out/offload.png
  python scripts/bench_offload.py --small_layers=32 --page_size=64 --lengths=8192   the time of the loop alone
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
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
from astraea_jax.kv_cache.offload import HostStore, block_sizes, cut, has_pinned_host
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
flags.DEFINE_integer("small_layers", 0, "So many layers of one small head, whose calls cost more than their bytes.")
flags.DEFINE_integer("chunk", 512, "Tokens of a prefill step.", lower_bound=16)
flags.DEFINE_integer("batch", 32, "Programs that decode while transfers run.", lower_bound=1)
flags.DEFINE_integer("context", 256, "Tokens of each of them.", lower_bound=1)
flags.DEFINE_integer("steps", 64, "Decode steps of a measurement.", lower_bound=8)
flags.DEFINE_integer("repeats", 5, "Measurements; the best counts for bandwidth, the median for steps.", lower_bound=1)
flags.DEFINE_string("plot", "out/offload.png", "File for the plot of restoring against recomputing.")
define_flags("bench_offload")
TYPICAL = 8192
"""Tokens near which the loop's time is measured."""
COPIES = (1, 8)
"""Copies that they are in: what a restore brings had been offloaded in about eight, by the simulator's count."""

console = Console()


def model_config(longest: int) -> ModelConfig:
    config = (
        PUBLISHED[FLAGS.model]
        if FLAGS.model in PUBLISHED
        else read_config(read_json(resolve(FLAGS.model) / "config.json"))
    )
    if FLAGS.small_layers:
        config = replace(config, num_layers=FLAGS.small_layers, num_heads=1, num_kv_heads=1, head_dim=8)
    return replace(config, max_position=max(longest, config.max_position))


@dataclass(frozen=True)
class HostTime:
    """Time that transfers take of the serving loop's thread."""

    copies: int
    blocks: int
    offload_s: float
    restore_s: float
    longest_s: float
    """The most of it in one turn of the loop."""


def uneven(pages: int, copies: int) -> list[int]:
    """Sizes of copies that make up ``pages`` pages, of several blocks each as those of programs are."""
    sizes = [pages // copies + (1, -1)[i % 2] for i in range(copies - 1)]
    return [*sizes, pages - sum(sizes)]


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
        self.scheduler.submit([i % self.config.vocab_size for i in range(tokens)], 1, now=time.perf_counter())
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

    def host_time(self, pages: int, copies: int) -> HostTime:
        """The least time of the loop's calls for offloading pages in several copies, and restoring them together.

        The device is idle at each call, so that none waits for it.
        """
        return min(
            (self._host_time(pages, copies) for _ in range(FLAGS.repeats)), key=lambda t: t.offload_s + t.restore_s
        )

    def _host_time(self, pages: int, copies: int) -> HostTime:
        program, parts = Program(0, 0.0), [Part(HostCopy(0, n, HostPages(n)), 0, n) for n in uneven(pages, copies)]
        ends = np.cumsum([part.pages for part in parts])
        there = [
            Transfer(program, tuple(self.spare[end - part.pages : end]), (part,), True, 0.0)
            for part, end in zip(parts, ends.tolist(), strict=True)
        ]
        offload = [call for transfer in there for call in self._calls(transfer)]
        restore = self._calls(Transfer(program, tuple(self.spare[:pages]), tuple(parts), False, 0.0))
        self.store.start([], [part.copy.memory for part in parts])
        blocks = sum(len(cut(part.pages, block_sizes(self.staging))) for part in parts)
        return HostTime(copies, blocks, sum(offload), sum(restore), max(*offload, *restore))

    def _calls(self, transfer: Transfer) -> list[float]:
        """Seconds of each call that a transfer takes."""
        taken: list[float] = []
        call: Callable[[], Any] = lambda: self.store.start([transfer], [])  # noqa: E731
        while not taken or self.store.busy:
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
            call = self.store.poll
            time.sleep(2e-3)  # for the copies, which nobody but the store can wait for
            self.runner.gather([0], FULL).block_until_ready()
        return taken

    def first_pinned_s(self, pages: int) -> float:
        """Seconds for which the first copy to pinned memory, which has to be pinned, holds up its caller."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        there = jnp.ones(pages * self.page_bytes // self.dtype.itemsize, self.dtype).block_until_ready()
        began = time.perf_counter()
        copied = jax.device_put(there, device.with_memory_kind("pinned_host"))
        took = time.perf_counter() - began
        copied.block_until_ready()
        return took

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
            self.scheduler.submit([i % self.config.vocab_size] * FLAGS.context, tokens, now=time.perf_counter())
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
        task = bar.add_task("measuring", total=2 * len(lengths) + FLAGS.repeats + 2)
        advance = lambda: bar.advance(task)  # noqa: E731
        bench.prefill_s(lengths[0])  # to warm up
        pages = -(-lengths[-1] // FLAGS.page_size)
        pinning_s = bench.first_pinned_s(pages)
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
        plain_out, plain_in = bench.plain(pages)
        advance()
        pages_moved = -(-min(lengths, key=lambda tokens: abs(tokens - TYPICAL)) // FLAGS.page_size)
        hosts = [bench.host_time(pages_moved, copies) for copies in COPIES if copies <= max(1, pages_moved // 2)]
        advance()
        alone_ms, moving_ms = bench.decode_ms(advance)
    moved = pages * bench.page_bytes
    return {
        "bytes": moved,
        "plain_out_gb_s": moved / plain_out / 1e9,
        "plain_in_gb_s": moved / plain_in / 1e9,
        "offload_gb_s": moved / resume[-1]["offload_s"] / 1e9,
        "restore_gb_s": moved / resume[-1]["restore_s"] / 1e9,
        "host": [asdict(host) for host in hosts],
        "host_tokens": pages_moved * FLAGS.page_size,
        "first_pinned_s": pinning_s,
        "decode_ms": alone_ms,
        "decode_while_moving_ms": moving_ms,
        "resume": resume,
    }


def per_gib(figures: dict[str, Any]) -> str:
    return f"{1e3 * figures['first_pinned_s'] / figures['bytes'] * 2**30:.0f} ms a GiB"


def sections(figures: dict[str, Any], dtype: str) -> list[Section]:
    f = figures
    rows = []
    for name, ours, plain in (("offload", "offload", "plain_out"), ("restore", "restore", "plain_in")):
        rate, floor = f[f"{ours}_gb_s"], f[f"{plain}_gb_s"]
        rows.append((name, f"{rate:.2f} GB/s", f"{floor:.2f} GB/s", f"{rate / floor:.0%}"))
    slower = f["decode_while_moving_ms"] / f["decode_ms"] - 1
    loop = [
        (
            f"{way} in {host['copies']} copies",
            f"{host['blocks']}",
            f"{1e3 * host[took]:.2f} ms",
            f"{1e6 * host[took] / host['blocks']:.0f} us a block",
        )
        for host in f["host"]
        for way, took in (("offload", "offload_s"), ("restore", "restore_s"))
    ]
    loop += [("  the most in one turn", "", f"{1e3 * max(host['longest_s'] for host in f['host']):.2f} ms", "")]
    loop += [
        (f"decode step, {FLAGS.batch} programs", "", f"{f['decode_ms']:.2f} ms", ""),
        ("  while KV moves", "", f"{f['decode_while_moving_ms']:.2f} ms", f"{slower:+.1%}"),
        ("first copy to pinned memory", "", f"{1e3 * f['first_pinned_s']:.1f} ms", per_gib(f)),
    ]
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
        Section(f"What {f['host_tokens']:,} tokens take of the loop's thread", ("", "blocks", "time", ""), loop),
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
