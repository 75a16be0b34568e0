"""Agents of a stock framework over HTTP, the same agents over gRPC with sessions that they name, and their process.

The framework is openai-agents, unmodified; it knows of no session. Either kind of agent does an errand of
:mod:`.agent_sessions`: the same prompts, the same tools, which take the same time. The process reads loads from its
standard input, a line of JSON each, and answers each with a line of JSON: what :class:`Load` and :class:`Done` hold.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import agents
from openai import AsyncOpenAI

from astraea_jax.agents.loop import run_program
from astraea_jax.agents.tools import Tool
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.lab.agent_sessions import JOB, SYSTEM, TOOLS, Ticket, make_tokenizer
from astraea_jax.lab.api_clients import MODEL
from astraea_jax.models.tokenizer import Tokenizer

INFERRED, NAMED, GRPC = "HTTP", "HTTP, named sessions", "gRPC, named sessions"
WAYS = (INFERRED, NAMED, GRPC)
TEMPLATE = "drops thoughts"
MAX_TOKENS = 4_096
TOOL_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Load:
    """Agents that begin one after the other."""

    way: str
    """One of :data:`WAYS`."""
    http_port: int
    grpc_port: int
    first: int
    """Number of the first session; every one has its own text."""
    agents: int
    turns: int
    """Turns of each agent's job."""
    over_s: float
    """Seconds over which they begin."""


@dataclass(frozen=True)
class Done:
    """What has become of a load."""

    seconds: list[float]
    """From the beginning of each agent to its answer."""
    cpu_s: float
    """Processor time of this process."""


class Errand:
    """A job: its question, and its tools, which know by their number which turn has called them.

    Args:
        number: of its session.
        turns: of the model, the last of which answers.
    """

    def __init__(self, number: int, turns: int):
        tickets = [Ticket(number, turn) for turn in range(JOB - turns, JOB)]
        self.question = tickets[0].question()
        self.answer = tickets[-1].written().rpartition("</think>")[2].strip()
        self._calls = ((later, i) for ticket, later in pairwise(tickets) for i in range(len(ticket.calls())))

    async def tool(self) -> str:
        """Take the time of the next call; returns its result."""
        ticket, call = next(self._calls)
        await asyncio.sleep(ticket.seconds(call))
        return ticket.result(call)


Run = Callable[[int, Errand], Awaitable[str]]
"""Runs the agent of a session, and returns its answer."""


def openai_client(port: int) -> AsyncOpenAI:
    """Make the framework's client of a server on this machine."""
    return AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def stock_agent(client: AsyncOpenAI, *, named: bool, api: str = "chat") -> Run:
    """Make agents of the framework, as its users write them; ``named``: they send a header that names the session."""
    agents.set_tracing_disabled(True)  # it would send traces to OpenAI
    model = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}[api](MODEL, client)

    async def run(number: int, errand: Errand) -> str:
        async def call(context: Any, arguments: str) -> str:
            return await errand.tool()

        headers = {"x-session-id": f"session {number}"} if named else None
        agent = agents.Agent(
            "reader",
            instructions=SYSTEM,
            model=model,
            model_settings=agents.ModelSettings(temperature=0, max_tokens=MAX_TOKENS, extra_headers=headers),
            tools=[
                agents.FunctionTool(f["name"], f["description"], f["parameters"], call, strict_json_schema=False)
                for f in (tool["function"] for tool in TOOLS)
            ],
        )
        return str((await agents.Runner.run(agent, errand.question, max_turns=JOB)).final_output)

    return run


def grpc_agent(client: Client) -> Run:
    """Make agents of :func:`~astraea_jax.agents.loop.run_program`."""
    params = SamplingParams(max_tokens=MAX_TOKENS)

    async def run(number: int, errand: Errand) -> str:
        async def call(**arguments: Any) -> str:
            return await errand.tool()

        tools = [
            Tool(f["name"], f["description"], f["parameters"], call, TOOL_TIMEOUT_S, None)
            for f in (tool["function"] for tool in TOOLS)
        ]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": errand.question}]
        done = await run_program(client, messages, tools, params=params, session=f"session {number}")
        return done.text.rpartition("</think>")[2]

    return run


async def play(load: Load, run: Run) -> Done:
    """Run agents, and time them.

    Raises:
        RuntimeError: an agent has not answered what it should.
    """
    spent = time.process_time()

    async def one(i: int) -> float:
        errand = Errand(load.first + i, load.turns)
        await asyncio.sleep(load.over_s * i / load.agents)
        began = time.perf_counter()
        answer = await run(load.first + i, errand)
        if answer.strip() != errand.answer:
            raise RuntimeError(f"agent {load.first + i} has answered {answer[:60]!r}, not {errand.answer[:60]!r}")
        return time.perf_counter() - began

    seconds = await asyncio.gather(*map(one, range(load.agents)))
    return Done(seconds, time.process_time() - spent)


async def play_through(load: Load, tokenizer: Tokenizer) -> Done:
    """Run agents in the way that their load names."""
    if load.way != GRPC:
        async with openai_client(load.http_port) as stock:
            return await play(load, stock_agent(stock, named=load.way == NAMED))
    async with Client(f"127.0.0.1:{load.grpc_port}", tokenizer) as client:
        return await play(load, grpc_agent(client))


async def main() -> None:
    """Play what comes on the standard input until it ends."""
    tokenizer = make_tokenizer(TEMPLATE)
    while line := await asyncio.to_thread(sys.stdin.readline):
        done = await play_through(Load(**json.loads(line)), tokenizer)
        sys.stdout.write(json.dumps(asdict(done)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
