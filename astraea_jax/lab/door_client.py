"""Loads that come through a front door, and the process that a client of one is.

  python -m astraea_jax.lab.door_client 9000 8000      ports of gRPC and HTTP

The process reads runs from its standard input, a line of JSON each, and answers each with a line of JSON: what
:class:`Run` and :class:`Played` hold. It is as lean as a client can be, so that what is measured is the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import httptools

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import Overloaded
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.lab.serving_load import Latencies
from astraea_jax.models import resolve
from astraea_jax.models.tokenizer import Tokenizer

GRPC = "grpc"
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
DOORS = (GRPC, *PATHS)
TAIL = 4096
"""Bytes that have room for the last two events of a stream."""

Ask = Callable[[Any, int, Callable[[], object]], Coroutine[Any, Any, int]]
"""Asks for so many tokens after a prompt, calls back at every message that comes, and returns how many tokens came.
Raises :class:`~astraea_jax.errors.Overloaded`."""


@dataclass(frozen=True)
class Run:
    """A load."""

    door: str
    """One of :data:`DOORS`."""
    prompts: Sequence[Any]
    """Token ids, or texts for chats."""
    outputs: Sequence[int]
    """Tokens to generate after each."""
    at: Sequence[float]
    """Seconds from the beginning at which each prompt arrives."""
    limit: int
    """Requests that may be under way at once; others wait on the client's side."""


@dataclass(frozen=True)
class Played:
    """The outcome of a load."""

    seconds: float
    """From the first arrival to the last message."""
    tokens: int
    requests: int
    """Answered."""
    refused: int
    messages: int
    ttft: Latencies | None
    """From sending to the first message, of the requests that were answered; None: there are none."""
    longest_ttft_s: float
    cpu_s: float
    """Processor time of the process that asked."""
    process: int
    """Number of that process."""


async def play(ask: Ask, run: Run) -> Played:
    """Send a load through a door."""
    spent, zero, gate = time.process_time(), time.perf_counter(), asyncio.Semaphore(run.limit)

    async def one(prompt: Any, output: int, at: float) -> tuple[int, list[float]]:
        """Tokens, and the times of sending and of each message."""
        await asyncio.sleep(max(0.0, zero + at - time.perf_counter()))
        async with gate:
            times = [time.perf_counter()]
            try:
                tokens = await ask(prompt, output, lambda: times.append(time.perf_counter()))
            except Overloaded:
                return 0, times
        if tokens != output:
            raise RuntimeError(f"{tokens} tokens came, {output} were asked for")
        return tokens, times

    asked = await asyncio.gather(*(one(*each) for each in zip(run.prompts, run.outputs, run.at, strict=True)))
    answered = [(tokens, times) for tokens, times in asked if tokens]
    waits = [times[1] - times[0] for _, times in answered]
    return Played(
        seconds=max((times[-1] for _, times in answered), default=zero) - zero - min(run.at),
        tokens=sum(tokens for tokens, _ in answered),
        requests=len(answered),
        refused=len(asked) - len(answered),
        messages=sum(len(times) - 1 for _, times in answered),
        ttft=Latencies.of(waits) if waits else None,
        longest_ttft_s=max(waits, default=0.0),
        cpu_s=time.process_time() - spent,
        process=os.getpid(),
    )


# -- doors ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def through(grpc_port: int, http_port: int) -> AsyncIterator[dict[str, Ask]]:
    """Ask through every door of a server."""
    tokenizer = Tokenizer.from_folder(resolve("astraea-tiny"))  # makes text that nobody looks at
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Client(f"127.0.0.1:{grpc_port}", tokenizer))
        yield {
            GRPC: asking(client.generate),
            **{door: _Http(http_port, path, stack) for door, path in PATHS.items()},
        }


def asking(generate: Callable[..., Any], params: SamplingParams | None = None) -> Ask:
    """Ask an engine, or a client that has the same face."""
    params = params or SamplingParams(ignore_eos=True)

    async def ask(prompt: Sequence[int], output: int, told: Callable[[], object]) -> int:
        tokens = 0
        async for delta in generate(prompt, replace(params, max_tokens=output)):
            told()
            tokens += len(delta.token_ids)
        return tokens

    return ask


class _Http:
    """Asks over connections that are kept, each for one request at a time."""

    def __init__(self, port: int, path: str, stack: AsyncExitStack):
        self._port, self._path, self._stack = port, path, stack
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __call__(self, prompt: Any, output: int, told: Callable[[], object]) -> int:
        if not self._idle:
            self._idle.append(await asyncio.open_connection("127.0.0.1", self._port))
            self._stack.callback(self._idle[-1][1].close)
        reader, writer = connection = self._idle.pop()
        asked = {"messages": [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else {"prompt": prompt}
        options = {"max_tokens": output, "ignore_eos": True, "temperature": 0, "stream": True}
        body = json.dumps({**asked, **options, "stream_options": {"include_usage": True}}).encode()
        head = f"POST {self._path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = _Answer(told)
        parser = httptools.HttpResponseParser(answer)
        while not answer.complete:
            data = await reader.read(65_536)
            if not data:
                raise ConnectionError("the server has hung up")
            parser.feed_data(data)
        self._idle.append(connection)
        if parser.get_status_code() == 429:
            raise Overloaded("refused")
        if parser.get_status_code() != 200:
            raise RuntimeError(f"status {parser.get_status_code()}: {answer.tail!r}")
        *_, last, _ = answer.tail.split(b"data: ")  # what comes after it is [DONE]
        return int(json.loads(last)["usage"]["completion_tokens"])


class _Answer:
    """Takes what the parser finds in an answer."""

    def __init__(self, told: Callable[[], object]):
        self._told = told
        self.complete = False
        self.tail = b""
        """The end of the body."""

    def on_body(self, data: bytes) -> None:
        self._told()
        self.tail = (self.tail + data)[-TAIL:]

    def on_message_complete(self) -> None:
        self.complete = True


# -- the process ----------------------------------------------------------------------------------------------------


async def main(grpc_port: int, http_port: int) -> None:
    """Play what comes on the standard input until it ends."""
    async with through(grpc_port, http_port) as doors:
        while line := await asyncio.to_thread(sys.stdin.readline):
            run = Run(**json.loads(line))
            sys.stdout.write(json.dumps(asdict(await play(doors[run.door], run))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
