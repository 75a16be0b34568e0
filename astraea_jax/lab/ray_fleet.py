"""A fleet on a Ray that runs on this machine alone, and agents in front of it."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from astraea_jax.agents.loop import ProgramResult, run_program
from astraea_jax.agents.tools import Tool, tool
from astraea_jax.engine.generation import Delta, Usage
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded
from astraea_jax.frontends import ray_serve
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.lab.http_agents import AGAIN_S, agent_client, run_http_agent
from astraea_jax.lab.shop import Task
from astraea_jax.models import resolve
from astraea_jax.models.tokenizer import Tokenizer

OBJECT_STORE_BYTES = 75 * 2**20
"""The least that Ray takes; nothing of ours goes through its object store."""
CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
SERVICES = "astraea_jax.frontends.ray_serve.services"
REPLICA = "SERVE_REPLICA::"
"""Beginning of the names that Serve gives its replicas' actors."""
MAX_TOKENS = 96


@dataclass(frozen=True)
class Fleet:
    """A server that agents may call: two doors."""

    url: str
    """Of HTTP, with ``/v1``."""
    address: str
    """Of gRPC."""

    @staticmethod
    def replicas() -> list[str]:
        """Names of the actors of all replicas."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        return sorted(each["name"] for each in actors if each["name"].startswith(REPLICA))

    @staticmethod
    def kill(replica: str) -> None:
        """Kill a replica's process, as a machine that fails does."""
        ray.kill(ray.get_actor(replica, namespace="serve"))


@contextmanager
def local_fleet(replicas: int, engine: Mapping[str, Any], **options: Any) -> Iterator[Fleet]:
    """Start Ray and the bundled model on it; all of it ends with the context.

    Args:
        replicas: of the model.
        engine: their configuration.
        options: further ones of :func:`astraea_jax.frontends.ray_serve.app`.
    """
    os.environ[CALLBACK] = "astraea_jax.frontends.ray_serve.proxies.middlewares"
    http, grpc = _free_ports(2)
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, log_to_driver=False)
    try:
        serve.start(
            http_options={"host": "127.0.0.1", "port": http},
            grpc_options={
                "port": grpc,
                "grpc_servicer_functions": [f"{SERVICES}.add_orchestrator", f"{SERVICES}.add_sessions"],
            },
        )
        deploy(replicas, engine, **options)
        yield Fleet(f"http://127.0.0.1:{http}/v1", f"127.0.0.1:{grpc}")
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(replicas: int, engine: Mapping[str, Any], **options: Any) -> None:
    """Deploy the app, or its next version, and wait until it serves."""
    deployment = {
        "num_replicas": replicas,
        "ray_actor_options": {"num_cpus": 1 / (replicas + 1)},  # a new version has room beside the old one
        "graceful_shutdown_timeout_s": 60.0,
        "health_check_period_s": 1.0,
    }
    serve.run(ray_serve.app(engine=engine, deployment=deployment, **options))


@dataclass(frozen=True)
class Ended:
    """An agent that has ended."""

    task: Task
    result: ProgramResult

    @property
    def right(self) -> bool:
        """Whether it gave the right answer."""
        return self.task.is_right(self.result.text)


async def run_agents(
    fleet: Fleet,
    tasks: Sequence[Task],
    *,
    http: bool,
    tool_s: float = 0.1,
    attempts: int = 1,
    ended: Callable[[int], object] = lambda count: None,
) -> list[Ended]:
    """Run an agent for each task, all at once.

    Args:
        fleet: serves them.
        tasks: of the shop.
        http: through which door.
        tool_s: seconds that a tool takes in the mean.
        attempts: times that a request is sent at most.
        ended: told how many have ended, whenever one has.
    """
    tokenizer = Tokenizer.from_folder(resolve("astraea-tiny"))
    done: list[Ended] = []
    async with Client(fleet.address, tokenizer) as client:

        async def one(number: int, task: Task) -> Ended:
            rng = random.Random(number)
            tools = [_taking(tool(function), rng, tool_s) for function in task.tools()]
            if http:
                async with agent_client(fleet.url) as web:
                    result = await run_http_agent(web, task.messages(), tools, max_tokens=MAX_TOKENS, attempts=attempts)
            else:
                model = Insisting(client, attempts)
                result = await run_program(model, task.messages(), tools, params=SamplingParams(max_tokens=MAX_TOKENS))
            done.append(Ended(task, result))
            ended(len(done))
            return done[-1]

        return list(await asyncio.gather(*(one(i, task) for i, task in enumerate(tasks))))


class Insisting:
    """A model whose failed requests are sent again.

    Args:
        client: of the server.
        attempts: times that a request is sent at most.
    """

    def __init__(self, client: Client, attempts: int):
        self.tokenizer, self._client, self._attempts = client.tokenizer, client, attempts
        self.tool_called, self.end_session = client.tool_called, client.end_session

    def generate(self, prompt: Sequence[int], params: SamplingParams | None = None, **about: Any) -> Insisted:
        """Send a request; see :class:`~astraea_jax.engine.interface.Model`."""
        return Insisted(lambda: self._client.generate(prompt, params, **about), self._attempts)


class Insisted:
    """A request that is sent until it is answered. If that may be more than once, nothing of it is seen before.

    Args:
        send: sends it.
        attempts: times that it is sent at most.
    """

    def __init__(self, send: Callable[[], Any], attempts: int):
        self._send, self._attempts = send, attempts
        self._stream = send()

    @property
    def usage(self) -> Usage | None:
        """Of the attempt that was answered."""
        usage: Usage | None = self._stream.usage
        return usage

    def cancel(self) -> None:
        """Stop it."""
        self._stream.cancel()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        if self._attempts == 1:
            async for delta in self._stream:
                yield delta
            return
        for left in reversed(range(self._attempts)):
            try:
                deltas = [delta async for delta in self._stream]
                break
            except (EngineDead, Overloaded):
                if not left:
                    raise
            await asyncio.sleep(AGAIN_S)
            self._stream = self._send()
        for delta in deltas:
            yield delta


def _taking(inner: Tool, rng: random.Random, mean_s: float) -> Tool:
    async def call(**arguments: object) -> object:
        await asyncio.sleep(rng.expovariate(1 / mean_s))
        return inner(**arguments)

    return inner.wrapped(call)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
