"""Many agents against a real server on this machine: right answers, a table, and a picture of where the time went.

Starts `scripts/serve.py` with the bundled model in a process of its own, then runs agents against it over gRPC. Each
agent gets a shopping question and real tools; a tool also waits as long as coding agents' tools were measured to take
(see astraea_jax/scheduler/workload.py), scaled by --tool_scale so that the whole takes about a minute.

  python scripts/demo.py
  python scripts/demo.py --programs=256 --concurrency=128 --tool_scale=1

Exits non-zero if too few answers are right or anything hangs.
"""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from astraea_jax.agent import ProgramResult, run_program
from astraea_jax.models import resolve
from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.plots import spans, timelines
from astraea_jax.rpc.client import Client
from astraea_jax.sampling import SamplingParams
from astraea_jax.scheduler.workload import CLAUDE_CODE_TOOLS
from astraea_jax.shop import Task, make_tasks
from astraea_jax.tools import Tool, tool

FLAGS = flags.FLAGS
flags.DEFINE_integer("programs", 128, "Agents to run.", lower_bound=1)
flags.DEFINE_integer("concurrency", 64, "Agents alive at once; the next arrives when one ends.", lower_bound=1)
flags.DEFINE_float("tool_scale", 1.0, "Factor on the tools' published durations.", lower_bound=0.0)
flags.DEFINE_integer("seed", 1, "Of the tasks and the tool times.")
flags.DEFINE_float("limit_s", 300.0, "Seconds after which the run counts as hung.")
flags.DEFINE_float("wanted", 0.95, "Share of right answers below which the exit status is 1.")
flags.DEFINE_string("picture", "out/demo.png", "Where the timelines are drawn.")

SERVER = Path(__file__).with_name("serve.py")
console = Console()


@dataclass(frozen=True)
class Outcome:
    task: Task
    result: ProgramResult

    @property
    def right(self) -> bool:
        return self.task.is_right(self.result.text)


def relay(line: str) -> None:
    console.print(f"[dim]server: {line.rstrip()}", highlight=False)


@contextmanager
def server() -> Iterator[str]:
    """A serving process; yields its address once it is ready."""
    command = [
        sys.executable,
        str(SERVER),
        "--model=astraea-tiny",
        "--port=0",
        f"--max_seqs={min(FLAGS.concurrency, 64)}",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            relay(line)
            if found := re.search(r"ready on (\S+)", line):
                break
        else:
            raise SystemExit(f"the server ended with status {process.wait()} before it was ready")
        threading.Thread(target=lambda: [relay(line) for line in process.stderr], daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        process.wait(timeout=60)


def waiting(inner: Tool, rng: random.Random) -> Tool:
    """``inner``, taking as long as a published tool call."""

    async def call(**arguments: object) -> object:
        await asyncio.sleep(FLAGS.tool_scale * CLAUDE_CODE_TOOLS.draw(rng))
        return inner(**arguments)

    return inner.wrapped(call)


async def run(address: str, tasks: list[Task]) -> list[Outcome]:
    tokenizer = Tokenizer.from_folder(resolve("astraea-tiny"))
    places = asyncio.Semaphore(FLAGS.concurrency)
    columns = (
        TextColumn("agents"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[right]} right"),
    )
    async with Client(address, tokenizer) as client:
        with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
            shown = bar.add_task("agents", total=len(tasks), right=0)
            right = 0

            async def one(number: int, task: Task) -> Outcome:
                nonlocal right
                rng = random.Random(FLAGS.seed * 1_000_003 + number)
                async with places:
                    tools = [waiting(tool(function), rng) for function in task.tools()]
                    result = await run_program(client, task.messages(), tools, params=SamplingParams(max_tokens=96))
                outcome = Outcome(task, result)
                right += outcome.right
                bar.update(shown, advance=1, right=right)
                return outcome

            async with asyncio.timeout(FLAGS.limit_s):
                return await asyncio.gather(*(one(i, task) for i, task in enumerate(tasks)))


def report(outcomes: list[Outcome], took_s: float) -> None:
    results = [o.result for o in outcomes]
    segments = [s for r in results for s in r.segments]
    jct = np.array([r.segments[-1].ended - r.segments[0].submitted for r in results])
    by_kind = {kind: sum(length for _, length in found) for kind, found in spans(segments).items()}
    ttft = np.array([s.first_token - s.submitted for s in segments])
    output = sum(s.output_tokens for s in segments)
    usages = [s.usage for s in segments if s.usage is not None]
    prompt, cached = sum(u.prompt_tokens for u in usages), sum(u.cached_tokens for u in usages)
    right = sum(o.right for o in outcomes)
    table = Table(title="Agents served", show_header=False)
    for name, value in [
        (
            "programs",
            f"{len(results)}, {FLAGS.concurrency} at once, {len(segments) / len(results):.1f} segments each",
        ),
        ("right answers", f"{right} of {len(results)} ({right / len(results):.1%})"),
        (
            "job completion time",
            f"mean {jct.mean():.2f} s, P50 {np.median(jct):.2f} s, P99 {np.quantile(jct, 0.99):.2f} s",
        ),
        (
            "time to first token",
            f"mean {1e3 * ttft.mean():.0f} ms, P99 {1e3 * np.quantile(ttft, 0.99):.0f} ms",
        ),
        ("output", f"{output:,} tokens, {output / took_s:,.0f} tokens/s"),
        ("prompts", f"{prompt:,} tokens, {cached / max(prompt, 1):.0%} of them kept from the segment before"),
        (
            "time in",
            ", ".join(f"{kind} {length / sum(by_kind.values()):.0%}" for kind, length in by_kind.items()),
        ),
        ("whole run", f"{took_s:.1f} s"),
    ]:
        table.add_row(name, value)
    console.print(table)


def main(_: list[str]) -> None:
    tasks = make_tasks(seed=FLAGS.seed, split="test", count=FLAGS.programs)
    with server() as address:
        began = time.monotonic()
        try:
            outcomes = asyncio.run(run(address, tasks))
        except TimeoutError:
            raise SystemExit(f"agents still ran after {FLAGS.limit_s:.0f} s: something hangs") from None
        took_s = time.monotonic() - began
    report(outcomes, took_s)
    for outcome in [o for o in outcomes if not o.right][:3]:
        console.print(
            f"[red]wrong:[/] {outcome.task.question!r} → {outcome.result.text!r}, not {outcome.task.answer!r}"
        )
    picture = Path(FLAGS.picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    timelines([o.result for o in outcomes], picture, f"{len(outcomes)} agents on one engine")
    console.print(f"timelines: {picture}")
    share = sum(o.right for o in outcomes) / len(outcomes)
    if share < FLAGS.wanted:
        raise SystemExit(f"only {share:.1%} of the answers are right; at least {FLAGS.wanted:.0%} were wanted")


if __name__ == "__main__":
    app.run(main)
