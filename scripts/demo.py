"""Agents on this machine: right answers from a real server, then what scheduling gains where memory is short.

First starts `scripts/serve.py` with the bundled model in a process of its own and runs agents against it: over gRPC,
and once more over HTTP, where they speak OpenAI's chat API as any agent framework does. Each agent gets a shopping
question and real tools; a tool also waits as long as coding agents' tools were measured to take (see
scheduler/simulation/workload.py), scaled by --tool_scale. The server's KV pool is deliberately too small for the
contexts of all agents; the answers must be the same in every run (--residency takes several strategies for KV that
waits). While a server runs, the page whose address it prints shows its programs.

Then replays recorded sessions of a coding agent, scaled to --context tokens, on one engine whose memory holds a part of
their contexts: `fcfs` without host memory for KV, as engines serve by default, and `astraea` with it. Both run the same
programs on the same compiled steps, one after the other, and in the other order with other programs.

  python scripts/demo.py
  python scripts/demo.py --programs=256 --concurrency=128 --tool_scale=1 --kv_bytes=67108864 --sessions=0
  python scripts/demo.py --residency=adaptive,always-keep,always-discard --nohttp

Exits non-zero if too few answers are right, if they differ between the runs, or if anything hangs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import app, flags
from absl import logging as absl_logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from astraea_jax.agents.loop import ProgramResult, run_program
from astraea_jax.agents.tools import Tool, tool
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import StartupError
from astraea_jax.frontends.flags import run_main
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.lab.http_agents import agent_client, run_http_agent
from astraea_jax.lab.plots import spans, timelines
from astraea_jax.lab.shop import Task, make_tasks
from astraea_jax.lab.short_memory import Shortage, replay_both_ways
from astraea_jax.models import resolve
from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.scheduler.simulation.workload import CLAUDE_CODE_TOOLS
from astraea_jax.scheduler.strategies import STRATEGIES

FLAGS = flags.FLAGS
flags.DEFINE_integer("programs", 64, "Agents of a run.", lower_bound=1)
flags.DEFINE_integer("concurrency", 64, "Agents alive at once; the next arrives when one ends.", lower_bound=1)
flags.DEFINE_float("tool_scale", 0.2, "Factor on the tools' published durations.", lower_bound=0.0)
flags.DEFINE_list("residency", ["adaptive"], f"Residency strategies to run, some of {', '.join(STRATEGIES)}.")
flags.DEFINE_bool("http", True, "Run the agents once more over HTTP, with the first of these strategies.")
flags.DEFINE_integer("kv_bytes", 3 * 2**20, "Device memory for KV; 2 KiB hold a token of astraea-tiny.", 1)
flags.DEFINE_integer("host_kv_bytes", 64 * 2**20, "Host memory for KV of agents that wait.", 0)
flags.DEFINE_integer("seed", 1, "Seed of the tasks and the tool times.")
flags.DEFINE_float("limit_s", 300.0, "Seconds after which the run counts as hung.")
flags.DEFINE_float("wanted", 0.95, "Share of right answers below which the exit status is 1.")
flags.DEFINE_integer("sessions", Shortage.programs, "Recorded sessions to replay; 0: no replay.", lower_bound=0)
flags.DEFINE_integer("context", Shortage.context, "Tokens that recorded sessions are scaled to fit in.", 1024, 32768)
flags.DEFINE_string("picture", "out/agents.png", "File for the picture of the agents' time.")
flags.DEFINE_string("replay_picture", "out/demo.png", "File for the picture of the replay.")

SERVER = Path(__file__).with_name("serve.py")
console = Console(width=max(140, Console().width))


@dataclass(frozen=True)
class Outcome:
    task: Task
    result: ProgramResult

    @property
    def right(self) -> bool:
        return self.task.is_right(self.result.text)


def one_of_strategies() -> list[str]:
    for name in FLAGS.residency:
        if name not in STRATEGIES:
            raise app.UsageError(f"--residency: {name!r} is none of {', '.join(STRATEGIES)}")
    return list(FLAGS.residency)


def relay(line: str) -> None:
    console.print(f"[dim]server: {line.rstrip()}", highlight=False)


def relay_all(lines: Iterable[str]) -> None:
    for line in lines:
        relay(line)


@contextmanager
def server(residency: str, cache: str) -> Iterator[tuple[str, str]]:
    """A serving process; yields its addresses over gRPC and HTTP once it is ready.

    What it compiles, the next one finds in ``cache``.
    """
    command = [
        sys.executable,
        str(SERVER),
        "--model=astraea-tiny",
        "--port=0",
        "--http_port=0",
        f"--max_seqs={min(FLAGS.concurrency, 64)}",
        f"--residency={residency}",
        f"--kv_bytes={FLAGS.kv_bytes}",
        f"--host_kv_bytes={FLAGS.host_kv_bytes}",
    ]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    assert process.stderr is not None
    try:
        url = ""
        for line in process.stderr:
            relay(line)
            if over_http := re.search(r"HTTP: (\S+),", line):
                url = over_http[1]
            if found := re.search(r"ready on (\S+)", line):
                break
        else:
            raise SystemExit(f"the server ended with status {process.wait()} before it was ready")
        threading.Thread(target=relay_all, args=(process.stderr,), daemon=True).start()
        yield found[1], url
    finally:
        process.terminate()
        process.wait(timeout=60)


def waiting(inner: Tool, rng: random.Random) -> Tool:
    """Make ``inner`` take as long as a published tool call."""

    async def call(**arguments: object) -> object:
        await asyncio.sleep(FLAGS.tool_scale * CLAUDE_CODE_TOOLS.draw(rng))
        return inner(**arguments)

    return inner.wrapped(call)


async def run(address: str, url: str | None, tasks: list[Task]) -> tuple[list[Outcome], dict[str, int]]:
    """Run all agents, over HTTP if there is a ``url``; returns their results and the engine's counts."""
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
                    if url:
                        async with agent_client(url) as http:
                            result = await run_http_agent(http, task.messages(), tools, max_tokens=96)
                    else:
                        result = await run_program(client, task.messages(), tools, params=SamplingParams(max_tokens=96))
                outcome = Outcome(task, result)
                right += outcome.right
                bar.update(shown, advance=1, right=right)
                return outcome

            async with asyncio.timeout(FLAGS.limit_s):
                outcomes = await asyncio.gather(*(one(i, task) for i, task in enumerate(tasks)))
        return outcomes, await client.counts()


@dataclass(frozen=True)
class Run:
    """All agents under one residency strategy, through one door."""

    name: str
    outcomes: list[Outcome]
    counts: dict[str, int]
    took_s: float

    @property
    def jct_s(self) -> np.ndarray:
        results = [o.result for o in self.outcomes]
        return np.array([r.requests[-1].ended - r.requests[0].submitted for r in results])

    @property
    def right(self) -> int:
        return sum(o.right for o in self.outcomes)

    def decided(self, action: str) -> int:
        """Count the decisions of the residency manager for this action."""
        return sum(count for name, count in self.counts.items() if name.startswith(f"kv {action}: "))


def report(run: Run) -> None:
    outcomes, took_s, jct = run.outcomes, run.took_s, run.jct_s
    results = [o.result for o in outcomes]
    requests = [s for r in results for s in r.requests]
    by_kind = {kind: sum(length for _, length in found) for kind, found in spans(requests).items()}
    ttft = np.array([s.first_token - s.submitted for s in requests])
    output = sum(s.output_tokens for s in requests)
    usages = [s.usage for s in requests if s.usage is not None]
    prompt, cached = sum(u.prompt_tokens for u in usages), sum(u.cached_tokens for u in usages)
    table = Table(title=f"Agents served, KV {run.name}", show_header=False)
    for name, value in [
        (
            "programs",
            f"{len(results)}, {FLAGS.concurrency} at once, {len(requests) / len(results):.1f} requests each",
        ),
        ("right answers", f"{run.right} of {len(results)} ({run.right / len(results):.1%})"),
        (
            "job completion time",
            f"mean {jct.mean():.2f} s, P50 {np.median(jct):.2f} s, P99 {np.quantile(jct, 0.99):.2f} s",
        ),
        (
            "time to first token",
            f"mean {1e3 * ttft.mean():.0f} ms, P99 {1e3 * np.quantile(ttft, 0.99):.0f} ms",
        ),
        ("output", f"{output:,} tokens, {output / took_s:,.0f} tokens/s"),
        ("prompts", f"{prompt:,} tokens, {cached / max(prompt, 1):.0%} of them kept from the request before"),
        (
            "time in",
            ", ".join(f"{kind} {length / sum(by_kind.values()):.0%}" for kind, length in by_kind.items()),
        ),
        ("whole run", f"{took_s:.1f} s"),
    ]:
        table.add_row(name, value)
    console.print(table)


def compare(runs: list[Run]) -> None:
    table = Table(
        title="KV of agents that wait, in a pool too small for all",
        caption="kept: tool waits; offloaded, restored, dropped: pages of 16 tokens; recomputed: tokens",
    )
    columns = ("kept", "offloaded", "restored", "dropped", "moved", "recomputed")
    for name in ("KV", "right", "mean JCT", "P99", *columns):
        table.add_column(name, justify="left" if name == "KV" else "right", no_wrap=True)
    for run in runs:
        counts, jct = run.counts, run.jct_s
        table.add_row(
            run.name,
            f"{run.right}",
            f"{jct.mean():.2f} s",
            f"{np.quantile(jct, 0.99):.2f} s",
            f"{run.decided('keep'):,}",
            f"{counts['offloaded_pages']:,}",
            f"{counts['restored_pages']:,}",
            f"{counts['dropped_pages']:,}",
            f"{(counts['offloaded_bytes'] + counts['restored_bytes']) / 2**20:,.0f} MiB",
            f"{counts['recomputed_tokens']:,}",
        )
    console.print(table)


def serve_and_run(residency: str, tasks: list[Task], cache: str, *, http: bool = False) -> Run:
    with server(residency, cache) as (address, url):
        began = time.monotonic()
        try:
            outcomes, counts = asyncio.run(run(address, url if http else None, tasks))
        except TimeoutError:
            raise SystemExit(f"agents still ran after {FLAGS.limit_s:.0f} s: something hangs") from None
        return Run(f"{residency}, HTTP" if http else residency, outcomes, counts, time.monotonic() - began)


def drawn_to(file: str) -> Path:
    """A file in a folder that exists."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def main(_: list[str]) -> None:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
    absl_logging.set_verbosity(absl_logging.WARNING)  # what JAX tells about backends that it did not find is noise here
    serve_agents()
    if FLAGS.sessions:
        shortage = Shortage(programs=FLAGS.sessions, context=FLAGS.context)
        try:
            replay_both_ways(shortage, console, drawn_to(FLAGS.replay_picture))
        except StartupError as error:
            raise SystemExit(f"demo: {error}") from error
        console.print(f"both ways side by side: {FLAGS.replay_picture}")


def serve_agents() -> None:
    """Serve the agents every way, and end the process if their answers are not right."""
    tasks = make_tasks(seed=FLAGS.seed, split="test", count=FLAGS.programs)
    with tempfile.TemporaryDirectory() as cache:
        strategies = one_of_strategies()
        runs = [serve_and_run(residency, tasks, cache) for residency in strategies]
        if FLAGS.http:
            runs.append(serve_and_run(strategies[0], tasks, cache, http=True))
    report(runs[0])
    compare(runs)
    outcomes = runs[0].outcomes
    for outcome in [o for o in outcomes if not o.right][:3]:
        console.print(
            f"[red]wrong:[/] {outcome.task.question!r} → {outcome.result.text!r}, not {outcome.task.answer!r}"
        )
    timelines([o.result for o in outcomes], drawn_to(FLAGS.picture), f"{len(outcomes)} agents on one engine")
    console.print(f"the agents' time: {FLAGS.picture}\n")
    for other in runs[1:]:
        changed = sum(a.result.text != b.result.text for a, b in zip(outcomes, other.outcomes, strict=True))
        if changed:
            raise SystemExit(f"{changed} answers differ between {runs[0].name} and {other.name}")
    share = min(r.right for r in runs) / len(outcomes)
    if share < FLAGS.wanted:
        raise SystemExit(f"only {share:.1%} of the answers are right; at least {FLAGS.wanted:.0%} were wanted")


if __name__ == "__main__":
    run_main(main)
