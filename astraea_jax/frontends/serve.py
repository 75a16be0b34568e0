"""Serves a model over HTTP (OpenAI's APIs) and gRPC (JetStream's Orchestrator service, health and reflection).

  astraea-jax serve                                   astraea-tiny, the bundled model; HTTP on port 8000, gRPC on 9000
  astraea-jax serve Qwen/Qwen3-0.6B                   a model of the Hugging Face hub, fetched into its usual cache
  astraea-jax serve /models/Qwen3-4B --nogrpc         over HTTP only; a Hugging Face or Orbax folder
  astraea-jax serve llama-3.1-8b --random_weights     a published shape without its weights, for benchmarks
  astraea-jax serve /models/Qwen3-32B --tensor_parallel=4 --data_parallel=2     two replicas on eight devices

(python scripts/serve.py does the same in a checkout, with --model=FOLDER.)

Several processes serve one model together, each started with the same flags and its own --process:

  astraea-jax serve --tensor_parallel=16 --coordinator=10.0.0.1:9100 --processes=2 --process=0

Requests that go on with a conversation are recognised, so that the engine keeps its KV while tools run; clients may
name it, too, by X-Session-ID (over gRPC as metadata, as is sampling). The first start compiles for a minute or more;
later ones take what is compiled from --compile_cache. The first SIGTERM or Ctrl-C lets running requests finish, the
second stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging as python_logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from astraea_jax.agents.mcp import connected
from astraea_jax.agents.tool_types import ToolError
from astraea_jax.agents.tools import Tool
from astraea_jax.engine import multiprocess
from astraea_jax.engine.compilation import default_cache, use_cache
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.loading import load_model, random_model
from astraea_jax.engine.replicas import load_engine
from astraea_jax.errors import EngineDead, RequestError, StartupError
from astraea_jax.frontends.flags import OPTIONS, engine_flags, run_main
from astraea_jax.frontends.http.flags import http_flags, key_flags, tls_flags, warning
from astraea_jax.frontends.http.server import Server as HttpServer
from astraea_jax.frontends.hub import find_model
from astraea_jax.frontends.kv_events.flags import kv_event_flags, wanted
from astraea_jax.frontends.logs import log_flags
from astraea_jax.frontends.operating import check_profiles, operator_flags
from astraea_jax.frontends.program_flags import program_flags
from astraea_jax.frontends.progress import StartupDisplay
from astraea_jax.frontends.rpc.server import Server
from astraea_jax.frontends.tool_flags import tool_flags
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.published import PUBLISHED

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "astraea-tiny", "Folder, bundled model, hub id, or with --random_weights a shape.")
flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id; by default the newest.")
flags.DEFINE_bool("random_weights", False, f"Random weights at a published shape: {', '.join(PUBLISHED)}.")
flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
flags.DEFINE_integer("port", 9000, "Port of gRPC; 0 takes a free one, named in the ready line.", 0, 65535)
flags.DEFINE_bool("grpc", True, "Serve gRPC.")
flags.DEFINE_bool("http", True, "Serve HTTP.")
http_server, door_keys, door_tls = http_flags(), key_flags(), tls_flags()
server_tools, make_operator, make_programs = tool_flags(), operator_flags(), program_flags()
options, kv_events = engine_flags(*OPTIONS), kv_event_flags()
set_up_logs = log_flags()
flags.DEFINE_string("coordinator", None, "host:port of process 0, where several processes serve one model together.")
flags.DEFINE_integer(
    "processes",
    1,
    "Number of processes that serve one model together; each is started with the same flags but --process.",
    1,
)
flags.DEFINE_integer("process", 0, "Number of this process, from 0; process 0 answers the clients.", 0)
flags.DEFINE_string(
    "compile_cache",
    None,
    "Folder where compiled steps are kept for later starts; empty: none. By default the one that JAX is configured "
    "for, or else astraea_jax/compiled in the user's cache folder.",
)
flags.DEFINE_float(
    "grace_s", 30.0, "Seconds until the process has ended after SIGTERM; running requests get all but two."
)
flags.register_validator(  # bounds of a flag would let nan pass
    "grace_s", lambda seconds: 0 <= seconds <= threading.TIMEOUT_MAX, "it must be a finite number of seconds, or 0"
)

LEAST_GRACE_S = 1.0
"""Seconds that hanging up may take, however little the grace."""


def engine_config() -> EngineConfig:
    """Make the configuration that the flags describe."""
    return options(compile_cache=compile_cache(), kv_events=wanted())


def compile_cache() -> str | None:
    """Return the folder for compiled steps and announce it. If the default one is unusable, warn and use none."""
    if FLAGS.compile_cache is not None:
        if not FLAGS.compile_cache:
            jax.config.update("jax_enable_compilation_cache", False)
        say(f"compile cache: {FLAGS.compile_cache or 'none'}")
        return FLAGS.compile_cache or None
    if configured := jax.config.values["jax_compilation_cache_dir"]:
        say(f"compile cache: {configured}, as JAX is configured")
        return None
    try:
        use_cache(default_cache())
    except StartupError as error:
        say(f"warning: {error}; every start compiles everything")
        return None
    say(f"compile cache: {default_cache()}")
    return default_cache()


def loaded_engine(display: StartupDisplay) -> Serving:
    """Load the model that the flags name."""
    config = engine_config()  # what is wrong with it shows before a model is fetched
    return load_engine(model(), config, random_weights=FLAGS.random_weights, progress=display.loading)


def model() -> str:
    """Return the shape, or the folder of the model, that the flags name."""
    return FLAGS.model if FLAGS.random_weights else str(find_model(FLAGS.model, FLAGS.revision))


def follow(display: StartupDisplay) -> None:
    """Run as a follower of process 0: repeat the operations that it dispatches."""
    for stop in (signal.SIGTERM, signal.SIGINT):  # whoever stops all processes at once lets the first one finish
        signal.signal(stop, lambda number, _: signal.signal(number, signal.SIG_DFL))
    config = engine_config()
    random = FLAGS.random_weights
    loaded = random_model(model(), config) if random else load_model(model(), config, display.loading)
    multiprocess.follow(loaded, config, display.compiling, lambda: say(f"process {FLAGS.process} follows"))


def say(line: str) -> None:
    """Print a line for the operator, who may have closed the other end."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Shutdown:
    """Ends the process on signals.

    The first one begins an orderly end; the second one, or one before the engine serves, ends the process at once.
    Whatever hangs, the process has ended when its grace is over.
    """

    def __init__(self, engine: Serving, display: StartupDisplay):
        self.begun = asyncio.Event()
        self._engine, self._display = engine, display
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.begun.is_set() or not self._engine.live:
            self._end_now("stopped at once")
        say(f"finishing running requests, {FLAGS.grace_s:.0f} s at most; a second signal stops at once")
        self.begun.set()
        timer = threading.Timer(
            max(FLAGS.grace_s, LEAST_GRACE_S), self._end_now, ["stopped: the grace is over and something hangs"]
        )
        timer.daemon = True
        timer.start()

    def _end_now(self, why: str) -> None:
        self._display.close()
        say(f"{why}; requests in progress: {self._engine.in_progress}")
        os._exit(1)


async def serve(engine: Serving, display: StartupDisplay, began: float) -> int:
    """Serve until a signal comes; returns how many requests the end has cut off.

    Raises:
        EngineDead: the engine has ended by itself.
        StartupError, ToolError: a flag cannot be followed, or an MCP server cannot be used.
    """
    async with connected(server_tools()) as tools:
        with kv_events(engine) as publishers:
            for publisher in publishers:
                say(f"KV events: {publisher}")
            return await serve_with(tools, engine, display, began)


async def serve_with(tools: Sequence[Tool], engine: Serving, display: StartupDisplay, began: float) -> int:
    """Serve, with tools that the server calls itself; see :func:`serve`."""
    doors = make_doors(engine, tools)
    ports = {}
    shutdown, cut = Shutdown(engine, display), 0
    try:
        for name, door in doors.items():  # before the compilation: a taken port shows at once, health says "not ready"
            ports[name] = await door.start()
        await asyncio.to_thread(engine.start, display.compiling)
        gc.collect()
        gc.freeze()  # what is loaded by now stays: collections while serving need not look through it
        display.close()
        announce(engine, ports, began)
        await shutdown_or_death(shutdown, engine)
        if not engine.live:
            raise EngineDead("the engine has failed; its log is above")
    finally:
        requests_s = FLAGS.grace_s - min(2.0, FLAGS.grace_s / 2)  # what is left is for hanging up
        cut = sum(await asyncio.gather(*[doors[name].stop(requests_s) for name in ports]))
        cut = max(cut, await asyncio.to_thread(engine.shutdown, 0))
    return cut


def make_doors(engine: Serving, tools: Sequence[Tool]) -> dict[str, Server | HttpServer]:
    """Make the front doors that the flags name.

    Raises:
        StartupError: there is none, or a flag cannot be followed.
    """
    keys, tls = door_keys(), door_tls()
    grammars = GrammarCompiler(engine.tokenizer)
    with contextlib.suppress(RequestError):  # it cannot be done for this tokenizer: whoever asks for a grammar is told
        grammars.prepare()  # now, because it holds up the whole process
    doors: dict[str, Server | HttpServer] = {}
    programs = make_programs(engine)
    if FLAGS.http:
        folder = None if FLAGS.random_weights else Path(model())
        operator = make_operator(engine, FLAGS.model, programs.continued)
        doors["HTTP"] = http_server(
            engine,
            FLAGS.model,
            folder,
            keys=keys,
            operator=operator,
            tls=tls,
            tools=tools,
            grammars=grammars,
            programs=programs,
        )
    if FLAGS.grpc:
        doors["gRPC"] = Server(engine, FLAGS.host, FLAGS.port, keys=keys, tls=tls, grammars=grammars, programs=programs)
    if not doors:
        raise StartupError("--nogrpc and --nohttp leave no door to serve through")
    if tools and not FLAGS.http:
        raise StartupError("--mcp and --tools are called for clients of HTTP only; leave out --nohttp")
    if line := warning(FLAGS.host, keys):
        say(line)
    return doors


async def shutdown_or_death(shutdown: Shutdown, engine: Serving) -> None:
    """Wait until a signal has come, or no replica serves any more."""
    loop = asyncio.get_running_loop()
    over = shutdown.begun
    engine.watch(lambda: engine.live or loop.call_soon_threadsafe(over.set))
    if engine.live:
        await over.wait()


def announce(engine: Serving, ports: Mapping[str, int], began: float) -> None:
    """Print the sizes that are served, and the addresses."""
    layout = engine.layout
    pages = layout.num_pages - 1
    size = layout.bytes_of(pages, layout.window.num_pages - 1 if layout.window else 0) / 2**20
    if FLAGS.tensor_parallel * FLAGS.data_parallel > 1:
        say(f"{FLAGS.data_parallel} replicas, devices of each: {FLAGS.tensor_parallel}; sizes are per replica")
    say(f"KV: {pages} pages of {engine.config.page_size} tokens, {size:.0f} MiB, context {layout.max_context}")
    if layout.window is not None:
        say(f"of these, {layout.window.num_pages - 1} pages for layers with a window of {layout.window.tokens} tokens")
    say(f"attention: {layout.backend.name}")
    if layout.host.pages:
        say(f"KV on the host: {layout.host.pages} pages, {layout.host.pages * layout.page_bytes / 2**20:.0f} MiB")
    if "HTTP" in ports:
        url = f"{'https' if FLAGS.tls_cert else 'http'}://{FLAGS.host}:{ports['HTTP']}"
        say(f"HTTP: {url}/v1, status page: {url}/status")
    port = ports.get("gRPC", ports.get("HTTP"))
    say(f"ready on {FLAGS.host}:{port} in {time.monotonic() - began:.1f} s")


def fail(cause: str) -> None:
    """Print in one line why nothing is served, and end the process."""
    say(f"cannot serve: {cause}")
    end(1)


def end(status: int) -> None:
    """End the process without waiting for other processes, or for a device that hangs."""
    try:
        python_logging.shutdown()
    finally:
        os._exit(status)


def main(arguments: list[str]) -> None:
    """Serve the model that the arguments name; what cannot be served gets one line."""
    if len(arguments) > 2:
        raise app.UsageError(f"one model is served, not {arguments[1:]}")
    if arguments[1:]:
        FLAGS["model"].value = arguments[1]
    logging.use_absl_handler()
    set_up_logs(logging.get_absl_handler())
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # what JAX tells about backends that it did not find is noise here
    began = time.monotonic()
    try:
        if FLAGS.processes > 1:
            multiprocess.join(FLAGS.coordinator or "", FLAGS.processes, FLAGS.process)
        with StartupDisplay() as display:
            if FLAGS.process > 0:
                follow(display)
                return
            door_tls()  # what is wrong with these flags shows before the weights are read
            check_profiles(door_keys(), http=FLAGS.http)
            engine = loaded_engine(display)
            if cut := asyncio.run(serve(engine, display, began)):
                say(f"requests cut off: {cut}")
                end(1)
    except EngineDead as error:
        say(f"cannot serve: {error}")
        end(1)
    except (
        CheckpointError,
        StartupError,
        ToolError,
        OSError,
        SystemExit,
    ) as error:  # the last is nothing that has served
        fail(repr(error) if isinstance(error, SystemExit) else str(error))
    except MemoryError:
        fail("out of memory; give a smaller --kv_bytes or --max_seqs")
    except RuntimeError as error:  # of the devices, when another process has gone before this one has compiled
        if FLAGS.processes == 1:
            raise
        fail(f"another process may have gone; its log says why ({error})")


def run() -> None:
    """Serve until a signal or a failure ends it."""
    run_main(main, __name__)
