"""Takes the picture of the status page in the README: agents at work, seen by headless Chromium.

  python scripts/status_picture.py --browser=chromium --picture=docs/status.png

The engine and the page's server run in this process; the page polls for --seconds.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import tempfile

from absl import flags
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from astraea_jax.agents import formats
from astraea_jax.agents.loop import run_program
from astraea_jax.agents.tools import Tool, tool
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.feeding import PatientModel
from astraea_jax.frontends.flags import run_main
from astraea_jax.frontends.http.app import make_app
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.operations import PAGE
from astraea_jax.frontends.http.server import Server
from astraea_jax.lab.shop import Task, make_tasks
from astraea_jax.scheduler.simulation.workload import CLAUDE_CODE_TOOLS

FLAGS = flags.FLAGS
flags.DEFINE_string("browser", "chromium-headless-shell", "Chromium, or its headless shell.")
flags.DEFINE_string("picture", "docs/status.png", "File for the picture.")
flags.DEFINE_integer("agents", 20, "Agents alive at once.", lower_bound=1)
flags.DEFINE_integer("seconds", 30, "How long they work before the picture is taken.", lower_bound=1)
CONFIG = EngineConfig(max_seqs=4, kv_bytes=2 * 2**20, host_kv_bytes=16 * 2**20, residency="adaptive", max_context=768)


class Held:
    """Adds to the page a picture that takes long to load: the browser draws a page when all of it has loaded."""

    def __init__(self, inner: ASGIApp):
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/hold":
            await asyncio.sleep(FLAGS.seconds)
            await Response(status_code=404)(scope, receive, send)
        elif scope["path"] == "/status":
            await HTMLResponse(f"{PAGE}<img src=hold hidden>")(scope, receive, send)
        else:
            await self._inner(scope, receive, send)


def waiting(inner: Tool, rng: random.Random) -> Tool:
    """Make ``inner`` take half as long as a published tool call."""

    async def call(**arguments: object) -> object:
        await asyncio.sleep(0.5 * CLAUDE_CODE_TOOLS.draw(rng))
        return inner(**arguments)

    return inner.wrapped(call)


async def work(engine: Engine, number: int) -> None:
    """Be one agent after the other."""
    rng = random.Random(number)
    await asyncio.sleep(rng.uniform(0, 15))
    while True:
        task: Task = rng.choice(make_tasks(seed=number, split="test", count=8))
        tools = [waiting(tool(function), rng) for function in task.tools()]
        await run_program(PatientModel(engine), task.messages(), tools, params=SamplingParams(max_tokens=96))


async def look(url: str, picture: str) -> None:
    """Let the browser look at the page, and take its picture."""
    with tempfile.TemporaryDirectory() as profile:
        process = await asyncio.create_subprocess_exec(
            *(FLAGS.browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={profile}", "--hide-scrollbars", "--window-size=1240,960"),
            *(f"--screenshot={picture}", url),
            stderr=subprocess.DEVNULL,
        )
        if await process.wait():
            raise SystemExit(f"{FLAGS.browser} ended with status {process.returncode}")


async def take(picture: str) -> None:
    """Serve, let agents work, and take the picture."""
    engine = Engine.from_folder("astraea-tiny", CONFIG)
    await asyncio.to_thread(engine.start)
    door = Door(engine, formats.choose(engine.tokenizer), ["astraea-tiny"])
    app_ = make_app(door)
    app_.app.add_middleware(Held)
    server = Server(app_, door)
    port = await server.start()
    agents = [asyncio.create_task(work(engine, number)) for number in range(FLAGS.agents)]
    await look(f"http://127.0.0.1:{port}/status", picture)
    for agent in agents:
        agent.cancel()
    await asyncio.gather(*agents, return_exceptions=True)
    await server.stop(0)
    engine.shutdown(0)


def main(_: list[str]) -> None:
    asyncio.run(take(os.path.abspath(FLAGS.picture)))


if __name__ == "__main__":
    run_main(main)
