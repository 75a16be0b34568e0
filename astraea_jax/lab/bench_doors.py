"""Measures what the front doors cost: streams over gRPC and HTTP beside the same load in this process.

Clients are in a process of their own. Rounds take each door in turn, and a ratio is the median of those of the rounds,
each to what was measured in this process in the same round. On few processors the clients, the doors and a CPU's steps
share them; the processor time of each says what a door costs where they do not, and "if busy" the ratio that follows
where nothing is ever idle. Two more parts: what constrained decoding costs, and what becomes of accepted requests when
twice as many arrive as can be served.

  python scripts/bench_doors.py                   astraea-tiny, 64 streams, on this machine's device
  python scripts/bench_doors.py --pretend_ms=5    the host's work alone, beside a device that takes 5 ms for a step
  python scripts/bench_doors.py --vocabulary=151936 --doors= --arrivals=0 --rows=1 --rows=8 --rows=32
                                                  constrained decoding alone, at a large vocabulary
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from absl import flags

from astraea_jax.agents import formats
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.engine.loading import load_model, random_model
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import StartupError
from astraea_jax.frontends.flags import MODEL, engine_flags, engine_title, run_main
from astraea_jax.frontends.http.app import make_app
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.server import Server as HttpServer
from astraea_jax.frontends.rpc.server import Server as RpcServer
from astraea_jax.lab.door_client import DOORS, Played, Run, asking, play
from astraea_jax.lab.pretended import PretendedRunner
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.roofline import Roofline
from astraea_jax.lab.serving_load import Latencies
from astraea_jax.lab.vocabulary import wide_model
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.tokenizer import Tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "astraea-tiny", "Checkpoint folder or bundled name; with --random_weights, a shape.")
flags.DEFINE_bool("random_weights", False, f"Random weights at a published shape: {', '.join(PUBLISHED)}.")
options = engine_flags(*MODEL, "max_step_tokens", max_step_tokens=512)
flags.DEFINE_list("doors", list(DOORS), "Front doors to measure; empty: none.")
flags.register_validator("doors", lambda given: {*given} <= {*DOORS}, f"--doors may name {', '.join(DOORS)}")
flags.DEFINE_integer("streams", 64, "Streams at once.", lower_bound=1)
flags.DEFINE_integer("words", 16, "Random words of a prompt.", lower_bound=1)
flags.DEFINE_integer("output", 256, "Tokens of each stream.", lower_bound=2)
flags.DEFINE_integer("rounds", 3, "Times that every way is measured, in turns.", lower_bound=1)
flags.DEFINE_multi_integer("rows", 32, "Rows that decode at once, with and without a JSON schema; 0: leave it out.", 0)
flags.DEFINE_integer("vocabulary", 0, "Random weights and so many tokens, most of them made up; 0: the model's.", 0)
flags.DEFINE_integer("arrivals", 512, "Requests that capacity is measured with, and half of overload; 0: leave out.", 0)
flags.DEFINE_float(
    "pretend_ms", 0.0, "Pretend a device that takes this long for a step and none of the host; 0: the real one.", 0.0
)
define_flags("bench_doors")

HERE = "in this process"
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "items": {
            "type": "array",
            "minItems": 1000,  # longer than any output, so that it ends where the free one does
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "count": {"type": "integer"},
                    "kind": {"enum": ["bug", "feature", "question"]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["name", "count", "kind", "tags"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "items"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Measured:
    """A load, and the processor time that this process has spent meanwhile."""

    played: Played
    cpu_s: float
    """All threads; on a CPU the steps are among them."""
    loop_s: float
    """The thread of the event loop, which all doors run in."""

    client_s: float
    """Of the client's process."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.played.tokens / self.played.seconds


# -- what serves ----------------------------------------------------------------------------------------------------


def engine_config() -> EngineConfig:
    """Make a configuration with a place for every stream."""
    return options(max_seqs=FLAGS.streams, max_queued=2 * FLAGS.streams)


def make_engine(config: EngineConfig) -> Engine:
    """Make an engine on this machine's device, or on a pretended one."""
    if FLAGS.vocabulary:
        loaded = wide_model(FLAGS.vocabulary, config)
    else:
        loaded = (random_model if FLAGS.random_weights else load_model)(FLAGS.model, config)
    if not FLAGS.pretend_ms:
        return Engine(loaded.decoder, loaded.tokenizer, config, loaded.meshes[0])
    vocab_size, avoided = loaded.decoder.config.vocab_size, loaded.tokenizer.eos_ids
    runner = PretendedRunner(FLAGS.pretend_ms / 1e3, vocab_size, avoided)
    return Engine(loaded.decoder, loaded.tokenizer, config, loaded.meshes[0], runner=lambda *_: runner)


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[Client]:
    """Serve an engine over every door, and start a client process."""
    door = Door(engine, formats.choose(engine.tokenizer), ["benchmark"])
    servers = (RpcServer(engine), HttpServer(make_app(door), door))
    ports = [str(await server.start()) for server in servers]
    command, pipe = (sys.executable, "-m", "astraea_jax.lab.door_client", *ports), asyncio.subprocess.PIPE
    client = Client(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**20))
    try:
        yield client
    finally:
        await client.end()
        for server in servers:
            await server.stop(0)


class Client:
    """A process of :mod:`.door_client`."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process

    def play(self, run: Run) -> Coroutine[Any, Any, Played]:
        """Have it send a load, which is written down before the answer is awaited."""
        return self._play(json.dumps(vars(run)).encode())

    async def _play(self, line: bytes) -> Played:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + b"\n")
        answer = await self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"cannot measure: a client ended with status {await self._process.wait()}, as above")
        found = json.loads(answer)
        return Played(**found | {"ttft": found["ttft"] and Latencies(**found["ttft"])})

    async def end(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


# -- what is measured -----------------------------------------------------------------------------------------------


class Prompts:
    """Chats of random words, none twice, so that no two prompts share more than the template.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._rng = np.random.default_rng(0)

    def together(self, door: str, count: int, output: int) -> Run:
        """Draw ``count`` prompts in the form that a door takes, which arrive at once."""
        return Run(door, self._chats(door, count), [output] * count, [0.0] * count, count)

    def mixed(self, door: str, at: Sequence[float], limit: int) -> Run:
        """Draw prompts with outputs of half to one and a half of ``--output`` tokens."""
        outputs = self._rng.integers(FLAGS.output // 2, FLAGS.output * 3 // 2, len(at), endpoint=True)
        return Run(door, self._chats(door, len(at)), outputs.tolist(), at, limit)

    def _chats(self, door: str, count: int) -> list[Any]:
        letters = self._rng.choice([*"abcdefghijklmnopqrstuvwxyz"], (count, FLAGS.words, 5))
        texts = [" ".join(map("".join, words)) for words in letters]
        return texts if door == "chat" else [self._ids(text) for text in texts]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode_chat([{"role": "user", "content": text}])


async def measure(playing: Awaitable[Played]) -> Measured:
    """Wait for a load, and look at the clocks before and after."""
    cpu_s, loop_s = time.process_time(), time.thread_time()
    played = await playing
    here = played.process == os.getpid()
    spent = time.process_time() - cpu_s, time.thread_time() - loop_s
    return Measured(played, *spent, client_s=0.0 if here else played.cpu_s)


async def streams(engine: Engine, client: Client, prompts: Prompts) -> dict[str, list[Measured]]:
    """Measure the doors in turns with the same load in this process."""
    here = asking(engine.generate)
    found: dict[str, list[Measured]] = {name: [] for name in (HERE, *FLAGS.doors)}
    for output in (2, *[FLAGS.output] * FLAGS.rounds):  # a short one to warm up
        for name, results in found.items():
            run = prompts.together(name, FLAGS.streams, output)
            result = await measure(play(here, run) if name == HERE else client.play(run))
            if result.played.refused:
                raise RuntimeError(f"{name}: {result.played.refused} requests were refused")
            if output > 2:
                results.append(result)
    return found


async def constrained(engine: Engine, prompts: Prompts, rows: int) -> dict[str, list[Measured]]:
    """Measure the same load with and without a schema, in turns."""
    schema = GrammarCompiler(engine.tokenizer).json_schema(SCHEMA)
    ways = {
        "free": asking(engine.generate),
        "JSON schema": asking(engine.generate, SamplingParams(ignore_eos=True, grammar=schema)),
    }
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    for output in (2, *[FLAGS.output] * FLAGS.rounds):
        for name, ask in ways.items():
            result = await measure(play(ask, prompts.together(HERE, rows, output)))
            if output > 2:
                found[name].append(result)
    return found


async def overload(client: Client, door: str, prompts: Prompts) -> tuple[Measured, Measured]:
    """Measure the capacity, then arrivals at twice that rate, none of which is sent again when it is refused.

    Outputs differ, so that in both cases requests begin while others go on: a prefill beside decodes takes longer than
    many prefills at once.
    """
    n = FLAGS.arrivals
    capacity = await measure(client.play(prompts.mixed(door, [0.0] * n, 2 * FLAGS.streams)))
    gaps = np.random.default_rng(1).exponential(capacity.played.seconds / n / 2, 2 * n)
    return capacity, await measure(client.play(prompts.mixed(door, np.cumsum(gaps).tolist(), 2 * n)))


# -- tables ---------------------------------------------------------------------------------------------------------


def streams_section(found: Mapping[str, Sequence[Measured]], title: str) -> Section:
    rows = []
    for name, results in found.items():
        tokens = sum(m.played.tokens for m in results)
        per_token = lambda seconds, tokens=tokens: f"{1e6 * sum(seconds) / tokens:.1f}"  # noqa: E731
        rows.append(
            (
                name,
                rate(results),
                *(("", "") if name == HERE else (ratio(results, found[HERE]), busy_ratio(results, found[HERE]))),
                f"{tokens / sum(m.played.messages for m in results):.1f}",
                per_token(m.loop_s for m in results),
                per_token(m.cpu_s for m in results),
                "" if name == HERE else per_token(m.client_s for m in results),
            )
        )
    columns = ("", "tokens/s", "of this process", "if busy", "tokens/message", "event loop", "server", "client")
    return Section(f"{title}; processor time in microseconds per token", columns, rows)


def rate(results: Sequence[Measured]) -> str:
    return f"{statistics.median(m.rate for m in results):,.0f}"


def ratio(results: Sequence[Measured], others: Sequence[Measured]) -> str:
    """The median of the rounds, and all of them."""
    ratios = sorted(a.rate / b.rate for a, b in zip(results, others, strict=True))
    return f"{statistics.median(ratios):.1%} ({ratios[0]:.0%} to {ratios[-1]:.0%})"


def busy_ratio(results: Sequence[Measured], others: Sequence[Measured]) -> str:
    """The ratio of rates where the processors of this machine, which clients share, have no time left.

    Beside a pretended device they have.
    """
    if FLAGS.pretend_ms:
        return ""
    per_token = lambda of: sum(m.cpu_s + m.client_s for m in of) / sum(m.played.tokens for m in of)  # noqa: E731
    return f"{per_token(others) / per_token(results):.1%}"


def constrained_section(found: Mapping[str, Sequence[Measured]], count: int) -> Section:
    free = found["free"]
    rows = []
    for name, results in found.items():
        tokens = sum(m.played.tokens for m in results)
        ratios = ("", "") if name == "free" else (ratio(results, free), busy_ratio(results, free))
        rows.append((name, rate(results), *ratios, f"{1e6 * sum(m.cpu_s for m in results) / tokens:.1f}"))
    columns = ("", "tokens/s", "of free", "if busy", "processor time, us per token")
    return Section(f"{count} rows, {FLAGS.output} tokens each", columns, rows)


def overload_section(found: Mapping[str, tuple[Measured, Measured]]) -> Section:
    rows = []
    for name, (capacity, over) in found.items():
        played = over.played
        queue_s = 1.5 * FLAGS.streams * FLAGS.output / capacity.rate  # a client gets no more than 3/4 of the queue
        rows.append(
            (
                name,
                f"{capacity.rate:,.0f}",
                f"{over.rate:,.0f}",
                f"{over.rate / capacity.rate:.1%}",
                busy_ratio([over], [capacity]),
                f"{played.requests}, {played.refused}",
                f"{queue_s:.2f}",
                played.ttft.text(1, 2) if played.ttft else "",
                f"{played.longest_ttft_s:.2f}",
            )
        )
    columns = ("", "capacity", "goodput", "of it", "if busy", "answered, refused", "queue s", "TTFT s", "longest s")
    title = f"Poisson arrivals at twice the capacity, {2 * FLAGS.arrivals} requests of about {FLAGS.output} tokens: "
    title += "tokens/s, the time that a full queue takes, and P50 / P90 / P99 of the time to the first token"
    return Section(title, columns, rows)


def _plain(found: Mapping[str, Sequence[Measured]]) -> dict[str, list[dict[str, Any]]]:
    """The figures as a record holds them."""
    return {name: [asdict(one) for one in results] for name, results in found.items()}


async def measure_all() -> None:
    config = engine_config()
    roofline = None if FLAGS.pretend_ms else Roofline.measure(config.weight_dtype())
    engine = make_engine(config)
    prompts = Prompts(engine.tokenizer)
    await asyncio.to_thread(engine.start)
    gc.collect()
    gc.freeze()  # as a server does
    device = f"pretended device, {FLAGS.pretend_ms:g} ms a step" if FLAGS.pretend_ms else engine_title(engine)
    title = f"{FLAGS.model}, {device}: {FLAGS.streams} streams, {FLAGS.output} tokens each"
    async with serving(engine) as client:
        sections: list[Section] = []
        figures: dict[str, Any] = {}
        if FLAGS.doors:
            found = await streams(engine, client, prompts)
            sections.append(streams_section(found, title))
            figures["streams"] = _plain(found)
        for rows in filter(None, FLAGS.rows):
            schema = await constrained(engine, prompts, rows)
            sections.append(constrained_section(schema, rows))
            figures.setdefault("constrained", {})[str(rows)] = _plain(schema)
        if FLAGS.arrivals:
            over = {name: await overload(client, name, prompts) for name in FLAGS.doors if name != "chat"}
            sections.append(overload_section(over))
            figures["overload"] = _plain(over)
    await asyncio.to_thread(engine.shutdown, 0)
    publish("bench_doors", sections, figures, roofline)


def main(_: list[str]) -> None:
    try:
        asyncio.run(measure_all())
    except (CheckpointError, StartupError) as error:
        raise SystemExit(f"cannot measure: {error}") from None


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)


if __name__ == "__main__":
    run()
