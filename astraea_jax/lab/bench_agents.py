"""Measures what it costs that sessions, jobs and waits are inferred: jobs of agents that name none, beside named ones.

The agents of a stock framework come over HTTP without a name, with a name, and the same agents come over gRPC with one
(:mod:`.stock_agents`), from a process of their own. The device is pretended, and its model writes what a script says;
scheduler, pages and doors are real. KV is short, so programs that wait lose theirs, and which ones do depends on what
is known of their waits.

  python scripts/bench_agents.py
  python scripts/bench_agents.py --agents=16 --turns=3 --rounds=1
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from absl import flags

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.agent_sessions import JOB, SYSTEM, TOOLS, Author, Ticket, make_tokenizer
from astraea_jax.lab.continuity_load import PAGE_BYTES, PAGE_SIZE, pretended_engine, serving
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.stock_agents import GRPC, TEMPLATE, WAYS, Done, Load
from astraea_jax.models.tokenizer import Tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_integer("agents", 64, "Agents at once.", lower_bound=1)
flags.DEFINE_integer("turns", 4, "Turns of each agent's job.", lower_bound=2, upper_bound=10)
flags.DEFINE_integer("rounds", 3, "Times that every way is measured, in turns.", lower_bound=1)
flags.DEFINE_float("over_s", 2.0, "Seconds over which the agents begin.", lower_bound=0)
flags.DEFINE_float("oversubscribed", 1.5, "KV that all agents hold in the end, by the KV that there is.", 0.1)
flags.DEFINE_float("step_ms", 8.0, "Milliseconds of a step of the pretended device.", lower_bound=0)
flags.DEFINE_float("token_us", 20.0, "Microseconds more for each token that a step computes.", lower_bound=0)
define_flags("bench_agents")


@dataclass(frozen=True)
class Round:
    """A load, and what the engine did meanwhile."""

    done: Done
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    server_cpu_s: float

    @property
    def mean_s(self) -> float:
        """Mean job completion time."""
        return statistics.mean(self.done.seconds)


class Clients:
    """The process of :mod:`.stock_agents`."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process

    async def play(self, load: Load) -> Done:
        """Have it run agents."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
        answer = await self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"cannot measure: the clients ended with {await self._process.wait()}, as above")
        return Done(**json.loads(answer))


@asynccontextmanager
async def clients() -> AsyncIterator[Clients]:
    """Start the process, and end it."""
    command, pipe = (sys.executable, "-m", "astraea_jax.lab.stock_agents"), asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**20)
    try:
        yield Clients(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def make_engine(pages: int) -> Engine:
    """Make an engine with so many pages."""
    tokenizer = make_tokenizer(TEMPLATE)
    config = EngineConfig(
        max_seqs=max(1, FLAGS.agents // 2),
        max_step_tokens=2_048,
        page_size=PAGE_SIZE,
        kv_bytes=pages * PAGE_BYTES,
    )
    times = {"step_s": FLAGS.step_ms / 1e3, "token_s": FLAGS.token_us / 1e6}
    return pretended_engine(tokenizer, config, Author(tokenizer), **times)


async def measure(client: Clients, way: str, pages: int) -> Round:
    """Run all agents in one way on a new engine, so that they find nothing of others."""
    engine = make_engine(pages)
    await asyncio.to_thread(engine.start)
    try:
        async with serving(engine, "job") as (http_port, grpc_port):
            spent = time.process_time()
            load = Load(way, http_port, grpc_port, 0, FLAGS.agents, FLAGS.turns, FLAGS.over_s)
            done = await client.play(load)
            work = engine.work
            cpu_s = time.process_time() - spent
            return Round(done, work.prompt_tokens, work.cached_tokens, work.output_tokens, cpu_s)
    finally:
        await asyncio.to_thread(engine.shutdown, 0)


def held_tokens() -> int:
    """Count the tokens that all agents hold when they have answered."""
    tokenizer = make_tokenizer(TEMPLATE)
    author = Author(tokenizer)
    return sum(_held(tokenizer, author, number) for number in range(FLAGS.agents))


def _held(tokenizer: Tokenizer, author: Author, number: int) -> int:
    tickets = [Ticket(number, turn) for turn in range(JOB - FLAGS.turns, JOB)]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": tickets[0].question()}]
    first = len(tokenizer.encode_chat(messages, TOOLS))
    results = [later.result(i) for ticket, later in pairwise(tickets) for i in range(len(ticket.calls()))]
    said = [*(ticket.written() for ticket in tickets), *results]
    return first + sum(len(tokenizer.encode(text)) for text in said)


def section(found: Mapping[str, Sequence[Round]], title: str) -> Section:
    """Make the table: medians of the rounds, and their ranges."""
    rows = []
    for way, rounds in found.items():
        times = sorted(one.mean_s for one in rounds)
        ratios = sorted(one.mean_s / named.mean_s for one, named in zip(rounds, found[GRPC], strict=True))
        tokens = sum(one.output_tokens for one in rounds)
        rows.append(
            (
                way,
                f"{statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})",
                "" if way == GRPC else f"{statistics.median(ratios):.1%} ({ratios[0]:.1%} to {ratios[-1]:.1%})",
                f"{sum(one.cached_tokens for one in rounds) / sum(one.prompt_tokens for one in rounds):.1%}",
                f"{sum(one.prompt_tokens for one in rounds) / len(rounds):,.0f}",
                f"{1e6 * sum(one.server_cpu_s for one in rounds) / tokens:.0f}",
                f"{1e6 * sum(one.done.cpu_s for one in rounds) / tokens:.0f}",
            )
        )
    columns = ("", "mean JCT, s", "of gRPC", "cached", "prompt tokens", "server", "clients")
    return Section(f"{title}; processor time in microseconds per output token", columns, rows)


async def measure_all() -> None:
    held = held_tokens()
    pages = 1 + round(held / FLAGS.oversubscribed / PAGE_SIZE)
    found: dict[str, list[Round]] = {way: [] for way in WAYS}
    async with clients() as client:
        for _ in range(FLAGS.rounds):
            for way, rounds in found.items():
                gc.collect()
                rounds.append(await measure(client, way, pages))
    title = f"{FLAGS.agents} agents of {FLAGS.turns} turns, KV {FLAGS.oversubscribed:g} times oversubscribed"
    figures: dict[str, Any] = {way: [asdict(one) for one in rounds] for way, rounds in found.items()}
    publish("bench_agents", [section(found, title)], {"pages": pages, "held": held, "ways": figures})


def main(_: list[str]) -> None:
    asyncio.run(measure_all())


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
