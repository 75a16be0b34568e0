"""Long sessions through every API, and how much of each prompt had been computed before.

What is *reusable* of a prompt is what the server held when the turn before it had ended: its prompt and all it wrote,
the last token excepted, which is never fed back.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from statistics import mean
from types import SimpleNamespace
from typing import Any

import grpc
import httpx

from astraea_jax.agents import formats
from astraea_jax.agents.continuity import Mode
from astraea_jax.agents.conversations import Conversations
from astraea_jax.agents.tools import tool
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.frontends.http.app import make_app
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.server import Server as HttpServer
from astraea_jax.frontends.programs import Programs
from astraea_jax.frontends.rpc.server import Server as RpcServer
from astraea_jax.lab.agent_sessions import JOB, STOP, SYSTEM, TOOLS, Author, Ticket, make_tokenizer
from astraea_jax.lab.api_clients import (
    MODEL,
    Agent,
    ChatAgent,
    Counts,
    Habits,
    MessagesAgent,
    News,
    ResponsesAgent,
    TextAgent,
)
from astraea_jax.lab.http_agents import agent_client
from astraea_jax.lab.pretended import ScriptedRunner
from astraea_jax.lab.shop import Task, make_tasks
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.tokenizer import Tokenizer

MODES: tuple[Mode, ...] = ("off", "job", "session")
TEXT = "gRPC, text"
APIS: Mapping[str, Callable[..., Agent]] = {
    "chat completions": ChatAgent,
    "messages": MessagesAgent,
    "responses": ResponsesAgent,
}
REMINDED, NOTICED = 4, 7
"""Turns after which a client adds a reminder to the results, or a system message."""
PAGE_SIZE = 16
PAGE_BYTES = PAGE_SIZE * 2 * 2 * 8 * 4
"""Keys and values of a page of the pretended model: two heads of eight numbers of four bytes."""
CONFIG = EngineConfig(max_seqs=16, max_step_tokens=8_192, page_size=PAGE_SIZE, kv_bytes=2**29, max_context=2**16)


@dataclass
class Measured:
    """The sessions of one kind of client."""

    reusable: int = 0
    """Tokens, over the requests within a job."""
    reused: int = 0
    """Those of them that came from the cache."""
    in_job: list[int] = field(default_factory=list)
    """Tokens computed for the prompt of each request within a job."""
    new_job: list[int] = field(default_factory=list)
    """The same of requests that begin a further job."""

    def add(self, counts: Sequence[Counts], tickets: Sequence[Ticket]) -> None:
        """Take in a session."""
        for before, now, ticket in zip(counts, counts[1:], tickets[1:], strict=False):
            if ticket.begins_job:
                self.new_job.append(now.prompt - now.cached)
            else:
                reusable = before.prompt + before.output - 1
                self.reusable += reusable
                self.reused += min(now.cached, reusable)
                self.in_job.append(now.prompt - now.cached)

    def text(self) -> str:
        """Show the share, and the mean tokens computed within jobs and for new ones."""
        share = f"{self.reused / self.reusable:.2%}" if self.reusable else "-"
        return " · ".join(
            [share, *(f"{mean(counts):,.0f}" if counts else "-" for counts in (self.in_job, self.new_job))]
        )


def pretended_engine(
    tokenizer: Tokenizer, config: EngineConfig, write: Callable[[Sequence[int]], Sequence[int]], **times: float
) -> Engine:
    """Make an engine whose model writes what a script says; everything but the device is real.

    Args:
        tokenizer: of the model.
        config: of the engine.
        write: see :class:`.pretended.ScriptedRunner`.
        times: of the steps, in the same place.
    """
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_position=2**17,
        tie_embeddings=True,
    )
    decoder: Any = SimpleNamespace(config=model)
    runner = ScriptedRunner(write, **times)
    return Engine(decoder, tokenizer, config, runner=lambda *_: runner)


@asynccontextmanager
async def serving(engine: Engine, mode: Mode) -> AsyncIterator[tuple[int, int]]:
    """Serve an engine over HTTP and gRPC; yields their ports."""
    programs = Programs(engine, Conversations(engine.tokenizer, mode, ttl_s=engine.config.session_ttl_s))
    door = Door(engine, formats.choose(engine.tokenizer), [MODEL], programs=programs)
    servers = (HttpServer(make_app(door), door), RpcServer(engine, programs=programs))
    http_port, grpc_port = [await server.start() for server in servers]
    try:
        yield http_port, grpc_port
    finally:
        for server in servers:
            await server.stop(0)


async def measure(
    template: str, mode: Mode, turns: int, sessions: int, *, changes_header: bool = True
) -> Mapping[str, Measured]:
    """Run sessions through all APIs at once, and measure those of each.

    Args:
        template: one of :data:`.agent_sessions.TEMPLATES`.
        mode: of continuity.
        turns: of each session.
        sessions: of each API; half of the clients return thoughts.
        changes_header: clients put a header before the system text that is never the same.
    """
    tokenizer = make_tokenizer(template)
    engine = pretended_engine(tokenizer, CONFIG, Author(tokenizer))
    await asyncio.to_thread(engine.start)
    found = {name: Measured() for name in (*APIS, TEXT)}
    try:
        async with serving(engine, mode) as (http_port, grpc_port), AsyncExitStack() as stack:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}"))
            playing = []
            for number in range(len(found) * sessions):
                name = [*found][number % len(found)]
                habits = Habits(number // len(found) % 2 == 0, changes_header, random.Random(number))
                if name == TEXT:
                    agent: Agent = TextAgent(channel, tokenizer, SYSTEM, TOOLS, STOP)
                else:
                    http = await stack.enter_async_context(_client(http_port))
                    agent = APIS[name](http, habits, SYSTEM, TOOLS)
                playing.append(_play(agent, [Ticket(number, turn) for turn in range(turns)], found[name]))
            await asyncio.gather(*playing)
            engine.check()
    finally:
        await asyncio.to_thread(engine.shutdown, 0)
    return found


async def measure_bundled(mode: Mode, sessions: int) -> Measured:
    """Run sessions of the bundled model on this machine's device; it has two tasks in each, one after the other."""
    engine = Engine.from_folder("astraea-tiny", EngineConfig(max_seqs=8, max_step_tokens=64, kv_bytes=2**26))
    await asyncio.to_thread(engine.start)
    measured = Measured()
    try:
        async with serving(engine, mode) as (port, _), AsyncExitStack() as stack:
            tasks = make_tasks(seed=5, split="test", count=2 * sessions)
            working = []
            for number, pair in enumerate(zip(tasks[::2], tasks[1::2], strict=True)):
                http = await stack.enter_async_context(_client(port))
                working.append(_work(http, number, pair, measured))
            await asyncio.gather(*working)
            engine.check()
    finally:
        await asyncio.to_thread(engine.shutdown, 0)
    return measured


def _client(port: int) -> httpx.AsyncClient:
    """Make a client for one agent of a server on this machine."""
    return agent_client(f"http://127.0.0.1:{port}")


async def _work(http: httpx.AsyncClient, number: int, tasks: Sequence[Task], measured: Measured) -> None:
    """Have the bundled model do tasks of the shop in one session; both have the tools of the first one's shop."""
    tools = {one.name: one for one in map(tool, tasks[0].tools())}
    habits = Habits(returns_thoughts=False, changes_header=False, random=random.Random(number))
    system, *_ = tasks[0].messages()
    agent = ChatAgent(http, habits, system["content"], [one.schema() for one in tools.values()])
    counts: list[Counts] = []
    tickets: list[Ticket] = []
    for job, task in enumerate(tasks):
        news = News(question=task.question)
        for turn in range(job * JOB, (job + 1) * JOB):
            counts.append(await agent.ask(news))
            tickets.append(Ticket(number, turn))
            if not agent.calls:
                break
            called = [(tools[c["function"]["name"]], json.loads(c["function"]["arguments"])) for c in agent.calls]
            news = News([str(await one.call(arguments)) for one, arguments in called])
    measured.add(counts, tickets)


async def _play(agent: Agent, tickets: Sequence[Ticket], measured: Measured) -> None:
    counts: list[Counts] = []
    for ticket in tickets:
        if ticket.begins_job:
            news = News(question=ticket.question())
        else:
            results = [ticket.result(call) for call in range(counts[-1].calls)]
            reminder = "Keep your list of tasks in mind." if ticket.turn % REMINDED == 0 else ""
            notice = f"There are {ticket.turn} new diagnostics." if ticket.turn % NOTICED == 0 else ""
            news = News(results, reminder, notice)
        counts.append(await agent.ask(news))
    measured.add(counts, tickets)
