"""scripts/serve.py as a process: what it says, how it ends, and its one-line answer to what cannot be served."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.models.tokenizer import Tokenizer

SERVE = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "serve.py")]
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


WAITS = """
from threading import Event
from astraea_jax.engine.runner import Runner
from astraea_jax.frontends.serve import Shutdown
read, seen, hear, heard = Runner.read, [], Shutdown._on_signal, Event()
def wait(self, step):
    seen.append(step)
    if len(seen) == 5:
        heard.wait()
    return read(self, step)
def tell(self):
    hear(self)
    heard.set()
Runner.read, Shutdown._on_signal = wait, tell
"""
"""The fifth step ends when a signal has come."""


async def drained(server, tokenizer):
    """Tokens that a request got which ran at SIGTERM, and the states that the health service told."""
    async with Client(server.address, tokenizer) as client, grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        stream = aiter(client.generate([1, 2, 3], LONG))
        tokens = [*(await anext(stream)).token_ids]
        watch = health.Watch(health_pb2.HealthCheckRequest())
        states = [(await watch.read()).status]
        server.process.send_signal(signal.SIGTERM)
        states.append((await watch.read()).status)
        async for delta in stream:
            tokens += delta.token_ids
        return tokens, states


def test_serves_and_finishes_what_runs_at_sigterm(serve, random_folder, greedy):
    tokenizer = Tokenizer.from_folder(random_folder)
    with serve("--step_timeout_s=600", before=WAITS) as server:
        tokens, states = asyncio.run(drained(server, tokenizer))
        assert server.process.wait(300) == 0
    assert tokens == greedy([1, 2, 3], 200, tokens)
    status = health_pb2.HealthCheckResponse
    assert states == [status.SERVING, status.NOT_SERVING]
    assert "KV: " in server.said
    assert "compile cache: " in server.said


def test_a_second_signal_stops_at_once(serve):
    with serve() as server:
        server.process.send_signal(signal.SIGSTOP)  # so that it sees both at once and cannot be done before the second
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGCONT)
        assert server.process.wait(300) == 1


HANGS = """
import time
from astraea_jax.engine.runner import Runner
read, seen = Runner.read, []
def hang(self, step):
    seen.append(step)
    time.sleep(0 if len(seen) < 5 else 1000)
    return read(self, step)
Runner.read = hang
"""
"""The fifth step never ends."""


SLOW = HANGS.replace("0 if len(seen) < 5 else 1000", "0.05")
"""Two hundred tokens take ten seconds."""


FIRST_DIES = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
from astraea_jax.scheduler.scheduler import Scheduler
plan, died = Scheduler.plan, []
def die(self, now):
    if self.stats().created and not died:
        died.append(self)
        raise ZeroDivisionError
    return plan(self, now)
Scheduler.plan = die
"""
"""The replica that gets the first request dies of it."""


async def outcome(server, tokenizer) -> Exception | None:
    """Return what a request for many tokens ends with."""
    async with Client(server.address, tokenizer) as client:
        try:
            async for _ in client.generate([1, 2, 3], LONG):
                pass
        except Exception as error:
            return error
    return None


def test_a_step_that_hangs_ends_the_process(serve, random_folder):
    with serve("--step_timeout_s=1", before=HANGS) as server:
        error = asyncio.run(outcome(server, Tokenizer.from_folder(random_folder)))
        assert isinstance(error, EngineDead)
        assert "step_timeout_s" in str(error)
        assert server.process.wait(300) == 1
        said = server.process.stderr.read()
    assert "in hang" in said, "the stack of the thread that hangs"
    assert "cannot serve: the engine has failed" in said


@pytest.mark.parametrize("before", ["", HANGS], ids=["busy", "hung"])
def test_sigterm_ends_the_process_within_its_grace_and_tells_what_it_cut(before, serve, random_folder):
    async def work() -> Exception | None:
        async with Client(server.address, tokenizer) as client:
            stream = aiter(client.generate([1, 2, 3], LONG))
            await anext(stream)
            server.process.send_signal(signal.SIGTERM)
            try:
                async for _ in stream:
                    pass
            except Exception as error:
                return error
            return None

    tokenizer = Tokenizer.from_folder(random_folder)
    with serve("--grace_s=2", before=before or SLOW) as server:
        error = asyncio.run(work())
        assert server.process.wait(300) == 1
        said = server.process.stderr.read()
    assert error is None or isinstance(error, EngineDead)
    assert "requests cut off: 1" in said or "requests in progress: 1" in said


def test_an_idle_server_ends_in_order_without_any_grace(serve):
    with serve("--grace_s=0") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(300) == 0
        assert "Traceback" not in server.process.stderr.read()


def test_what_a_replica_has_cut_by_dying_is_no_fault_of_an_orderly_end(serve, random_folder):
    with serve("--data_parallel=2", before=FIRST_DIES) as server:
        error = asyncio.run(outcome(server, Tokenizer.from_folder(random_folder)))
        assert isinstance(error, EngineDead)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(300) == 0


@pytest.mark.parametrize("grace", ["nan", "inf", "-1"])
def test_a_grace_must_be_a_number_of_seconds(grace, serve_fails):
    assert "grace_s" in serve_fails(f"--grace_s={grace}")


def test_what_ends_silently_before_it_has_served_is_a_failure(random_folder):
    """SystemExit ends a process without a word."""
    before = "from astraea_jax.engine.runner import Runner\ndef leave(*_): raise SystemExit(0)\nRunner.compile = leave"
    command = f"{before}\nimport runpy\nrunpy.run_path({SERVE[1]!r}, run_name='__main__')"
    arguments = [sys.executable, "-c", command, f"--model={random_folder}", "--port=0", "--http_port=0"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "cannot serve: " in done.stderr


def test_a_taken_port_is_told_before_compiling(serve_fails, random_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = serve_fails(f"--model={random_folder}", f"--port={taken.getsockname()[1]}", "--http_port=0")
    assert "choose another --port" in said
    assert "executables" not in said


def test_a_default_cache_that_cannot_be_used_is_done_without(monkeypatch, tmp_path):
    """Asked of new processes, since JAX reads the variable when it is imported."""

    def said() -> str:
        return subprocess.run([*SERVE, "--model=/no/such/folder"], capture_output=True, text=True, timeout=300).stderr

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert f"compile cache: {tmp_path}/astraea_jax/compiled" in said()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    without = said()
    assert "warning: the compile cache" in without
    assert "neither a folder" in without


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model=/no/such/folder"], "'/no/such/folder' is neither a folder"),
        (["--model=no-such-shape", "--random_weights"], "llama-3.1-8b"),
        (["--compile_cache=/dev/null"], "the compile cache /dev/null cannot be used"),
        (["--session_ttl_s=inf"], "session_ttl_s is inf; it must be a finite number of seconds above 0"),
        (["--tls_cert=cert.pem"], "TLS needs both --tls_cert and --tls_key"),
        (["--tls_cert=cert.pem", "--tls_key=key.pem"], "TLS cannot be served with cert.pem and key.pem"),
        (["--kv_events=tcp://*:65536", "--nohttp"], "KV events: there is no port 65536"),
        (["--max_seqs=64", "--max_step_tokens=8"], "max_step_tokens 8 is below max_seqs 64"),
    ],
)
def test_what_cannot_be_served_gets_one_line(arguments, words, serve_fails):
    said = serve_fails(*arguments)
    [line] = [line for line in said.splitlines() if line.startswith("cannot serve: ")]
    assert words in line
    assert "Traceback" not in said


def test_whoever_cannot_tell_why_ends_all_the_same():
    """With the status of a failure, not with that of an exception, nor waiting for other processes."""
    read, write = os.pipe()
    os.close(read)
    script = "from astraea_jax.frontends.serve import fail; fail('nobody listens'); raise SystemExit(3)"
    try:
        assert subprocess.run([sys.executable, "-c", script], stderr=write, check=False).returncode == 1
    finally:
        os.close(write)
