"""Two processes with two (simulated) devices each serve one model: the tokens of one device, one end, one fault."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import extras_process
from support.ports import free_port
from support.wide import PAGE_BYTES, programs, run_programs, tokens

from astraea_jax.engine.dispatch import InFlight
from astraea_jax.engine.multiprocess import LeaderRunner
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.models.tokenizer import Tokenizer

SHORT = SamplingParams(max_tokens=2, ignore_eos=True)
SERVE = str(Path(__file__).parents[2] / "scripts" / "serve.py")


def two_devices() -> dict[str, str]:
    """The environment of a process that has two."""
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    return {**os.environ, "XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}


@contextmanager
def two_processes(folder: Path) -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    """The processes, and the address of the first; their pool is small, and they have a host tier."""
    flags = {
        "model": folder,
        "port": 0,
        "http_port": 0,
        "tensor_parallel": 4,
        "coordinator": f"127.0.0.1:{free_port()}",
        "processes": 2,
        "max_seqs": 4,
        "max_step_tokens": 16,
        "page_size": 4,
        "max_context": 96,
        "kv_bytes": 10 * PAGE_BYTES,
        "host_kv_bytes": 80 * PAGE_BYTES,
        "residency": "always-offload",
        "dtype": "float32",
        "attention": "reference",
    }
    command = [sys.executable, SERVE, *(f"--{name}={value}" for name, value in flags.items())]
    processes = [
        subprocess.Popen([*command, f"--process={i}"], env=two_devices(), stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        said = ""
        for line in processes[0].stderr:
            said += line
            if found := re.search(r"ready on (\S+) in", line):
                break
        else:
            processes[1].kill()
            pytest.fail(f"no server: {said}\n{processes[1].stderr.read()}")
        yield processes, found[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.serves("reference", "tested", "multi-process", "tensor parallelism")
def test_two_processes_say_what_one_device_says_and_end_together(wide_folder, wide_engine):
    """Preempted, and with KV that went to the memory of both and came back."""
    tokenizer = Tokenizer.from_folder(wide_folder)
    with two_processes(wide_folder) as (processes, address):

        async def work() -> tuple[list[list[int]], dict[str, int]]:
            async with Client(address, tokenizer) as client:
                return await programs(client), await client.counts()

        outputs, counts = asyncio.run(work())
        assert outputs == run_programs(wide_engine, alone=True)
        assert min(counts["offloaded_pages"], counts["restored_pages"]) > 0, "the pool was meant to be small"
        assert counts["failed_transfers"] == 0
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        assert [process.wait(300) for process in processes] == [0, 0], [p.stderr.read() for p in processes]


@pytest.mark.serves("native", "tested", "multi-process")
def test_two_processes_draw_again_together(wide_folder, wide_engine):
    command = [sys.executable, extras_process.__file__, str(wide_folder), f"127.0.0.1:{free_port()}"]
    processes = [
        subprocess.Popen(
            [*command, str(i)], env=two_devices(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        (out, error), _ = (process.communicate(timeout=300) for process in processes)
        assert [process.returncode for process in processes] == [0, 0], error
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    expected = asyncio.run(extras_process.said(wide_engine))
    assert [tuple(one) for one in json.loads(out.splitlines()[-1])] == expected


def test_a_process_that_dies_is_named(wide_folder):
    with two_processes(wide_folder) as (processes, address):

        async def ask() -> None:
            async with Client(address, Tokenizer.from_folder(wide_folder)) as client:
                assert len(await tokens(client.generate([1, 2, 3], SHORT))) == 2
                processes[1].send_signal(signal.SIGSTOP)  # so that the next request has not ended when it dies
                running = asyncio.create_task(tokens(client.generate([1, 2, 3], SHORT)))
                while not (await client.counts())["running"]:
                    await asyncio.sleep(0.01)
                processes[1].kill()
                with pytest.raises(EngineDead, match="process 1 has gone"):
                    await running

        asyncio.run(ask())
        assert processes[0].wait(300) == 1
        assert "process 1 has gone" in processes[0].stderr.read()


def test_a_step_that_never_ends_is_given_up():
    """Devices wait for ever for those of a process that hangs."""

    class Endless:
        def is_ready(self) -> bool:
            return False

    runner = object.__new__(LeaderRunner)
    runner._step_timeout_s = 0.01
    with pytest.raises(EngineDead, match=r"a step has not ended within 0\.01 s; one of the processes .* hangs"):
        runner.read(InFlight(None, Endless(), 0.0))
