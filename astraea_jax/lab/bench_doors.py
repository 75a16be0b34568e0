"""Measures what the front doors cost: tokens per second of streams over HTTP and gRPC, beside the same in this process.

One engine serves all of them, in one run: first streams in this process, then over each door with the client in a
process of its own, and so on in turns, because machines are unsteady. What counts is the ratio to the run before.

  python scripts/bench_doors.py                       64 streams of astraea-tiny
  python scripts/bench_doors.py --streams=16 --output=500 --rounds=9
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import numpy as np
from absl import flags
from rich.console import Console

from astraea_jax.agents import formats
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.flags import engine_flags, run_main
from astraea_jax.frontends.http.app import make_app
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.server import Server as HttpServer
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.server import Server as RpcServer
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.roofline import Roofline

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "astraea-tiny", "Checkpoint folder or bundled name.")
options = engine_flags("max_seqs", "max_step_tokens", max_seqs=64)
flags.DEFINE_integer("streams", 64, "Streams at once.", lower_bound=1)
flags.DEFINE_integer("input", 32, "Tokens of a prompt.", lower_bound=1)
flags.DEFINE_integer("output", 300, "Tokens of a stream.", lower_bound=2)
flags.DEFINE_integer("rounds", 7, "Rounds; medians count.", lower_bound=1)
flags.DEFINE_string("client", None, "Internal: the door and the port that this process is a client of.")
define_flags("bench_doors")

Stream = Callable[[list[int]], Awaitable[tuple[int, int]]]
"""Sends a prompt; returns the tokens and the messages that came."""


async def throughput(stream: Stream) -> tuple[float, int]:
    """Tokens per second of all streams together, and messages."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, FLAGS.input).tolist() for _ in range(FLAGS.streams)]
    await stream(prompts[0])  # opens the connection
    began = time.perf_counter()
    done = await asyncio.gather(*map(stream, prompts))
    seconds = time.perf_counter() - began
    tokens = sum(count for count, _ in done)
    if tokens != FLAGS.streams * FLAGS.output:
        raise RuntimeError(f"{tokens} tokens came, not {FLAGS.streams * FLAGS.output}")
    return tokens / seconds, sum(messages for _, messages in done)


async def over_grpc(port: int) -> tuple[float, int]:
    """Streams of JetStream's ``Decode``."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        decode = channel.unary_stream(
            f"/{wire.ORCHESTRATOR}/Decode",
            request_serializer=wire.DecodeRequest.SerializeToString,
            response_deserializer=wire.DecodeResponse.FromString,
        )

        async def stream(prompt: list[int]) -> tuple[int, int]:
            request = wire.DecodeRequest(token_content={"token_ids": prompt}, max_tokens=FLAGS.output, has_bos=True)
            tokens = messages = 0
            async for response in decode(request, metadata=(("x-ignore-eos", "true"),)):
                tokens += len(response.stream_content.samples[0].token_ids)
                messages += 1
            return tokens, messages

        return await throughput(stream)


async def over_http(port: int) -> tuple[float, int]:
    """Streams of OpenAI's ``/v1/completions``; their usage counts the tokens. A bare client, to cost little itself."""

    async def stream(prompt: list[int]) -> tuple[int, int]:
        body = json.dumps(
            {
                "model": FLAGS.model,
                "prompt": prompt,
                "max_tokens": FLAGS.output,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        )
        writer.write(f"{head}content-type: application/json\r\n\r\n{body}".encode())
        events = [line async for line in reader if line.startswith(b"data: {")]
        writer.close()
        if not events:
            raise RuntimeError("the server refuses the stream")
        usage = json.loads(events[-1].removeprefix(b"data: "))["usage"]
        return usage["completion_tokens"], len(events)

    return await throughput(stream)


DOORS = {"gRPC": over_grpc, "HTTP": over_http}


async def in_process(engine: Engine) -> float:
    """Tokens per second of streams in this process."""
    params = SamplingParams(max_tokens=FLAGS.output, ignore_eos=True)

    async def stream(prompt: list[int]) -> tuple[int, int]:
        return sum([len(delta.token_ids) async for delta in engine.generate(prompt, params)]), 0

    return (await throughput(stream))[0]


async def as_client(door: str, port: int) -> tuple[float, int]:
    """Run a client of a door in a process of its own."""
    command = [sys.executable, *sys.argv, f"--client={door}:{port}"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the client of {door} ended with status {process.returncode}, as above")
    rate, messages = json.loads(output)
    return float(rate), int(messages)


async def measure(engine: Engine) -> list[dict[str, Any]]:
    """Tokens per second of every round: in this process, and of every door with its messages."""
    door = Door(engine, formats.choose(engine.tokenizer, None), [FLAGS.model])
    servers = {"gRPC": RpcServer(engine), "HTTP": HttpServer(make_app(door, Keys()), door)}
    ports = {name: await server.start() for name, server in servers.items()}
    await in_process(engine)
    rounds = []
    for _ in range(FLAGS.rounds):
        found: dict[str, Any] = {}
        for name, port in ports.items():
            before = await in_process(engine)
            rate, messages = await as_client(name, port)
            found[name] = {"in_process": before, "rate": rate, "messages": messages}
        rounds.append(found)
    for server in servers.values():
        await server.stop(0)
    return rounds


def table(rounds: Sequence[dict[str, Any]]) -> Section:
    """Medians of all rounds."""
    rows = []
    for door in DOORS:
        of_door = [found[door] for found in rounds]
        middle = {key: statistics.median(one[key] for one in of_door) for key in ("in_process", "rate", "messages")}
        ratios = sorted(one["rate"] / one["in_process"] for one in of_door)
        rows.append(
            (
                door,
                f"{middle['in_process']:,.0f}",
                f"{middle['rate']:,.0f}",
                f"{statistics.median(ratios):.1%}",
                f"{ratios[0]:.0%} to {ratios[-1]:.0%}",
                f"{FLAGS.streams * FLAGS.output / middle['messages']:.1f}",
            )
        )
    title = f"{FLAGS.model}: {FLAGS.streams} streams of {FLAGS.output} tokens, medians of {FLAGS.rounds} rounds"
    columns = ("", "tokens/s in this process", "over the door", "kept", "least and most", "tokens per message")
    return Section(title, columns, rows)


def main(_: list[str]) -> None:
    """Measure, or be the client of a door."""
    if FLAGS.client:
        door, _, port = FLAGS.client.rpartition(":")
        sys.stdout.write(json.dumps(asyncio.run(DOORS[door](int(port)))))
        return
    engine = Engine.from_folder(FLAGS.model, options(max_queued=max(1024, 2 * FLAGS.streams)))
    roofline = Roofline.measure(engine.layout.dtype)
    engine.start()
    rounds = asyncio.run(measure(engine))
    engine.shutdown(0)
    publish("bench_doors", [table(rounds)], {"rounds": rounds}, roofline, console=Console())


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
