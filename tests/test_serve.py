"""The serving process: what it says, how it refuses to start, how it ends."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.rpc.client import Client
from astraea_jax.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "scripts/serve.py"]
FEW = ["--max_seqs=4", "--max_step_tokens=16", "--kv_bytes=1000000", "--port=0"]


def test_help_teaches():
    text = subprocess.run([*COMMAND, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for word in ("x-session-id", "--model", "--kv_bytes", "program-fcfs", "python scripts/serve.py"):
        assert word in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=nowhere"], "'nowhere' is neither"),
        (["--model=llama-9", "--random_weights"], "llama-3.1-8b"),
        (["--kv_bytes=10"], "fewer than two pages"),
        (["--max_context=99999999"], "max_context 99999999"),
    ],
)
def test_what_cannot_be_served_is_one_line(flags, words):
    done = subprocess.run([*COMMAND, "--port=0", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("cannot serve:")
    assert words in last
    assert "Traceback" not in done.stderr


@pytest.fixture
def server(random_folder):
    process = subprocess.Popen(
        [*COMMAND, f"--model={random_folder}", *FEW], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "ready on" in line:
            break
    yield process, "".join(lines)
    process.kill()
    process.wait()


async def test_a_first_signal_drains(server, random_folder):
    process, said = server
    assert re.search(r"weights: .* MB\n", said)
    assert re.search(r"compile: (\d+)/\1 step shapes\n", said)
    assert re.search(r"KV: \d+ pages of 16 tokens", said)
    async with Client(re.search(r"ready on (\S+)", said)[1], Tokenizer.from_folder(random_folder)) as client:
        iterator = aiter(client.generate([1, 2], SamplingParams(max_tokens=100, ignore_eos=True)))
        tokens = [*(await anext(iterator)).token_ids]
        process.send_signal(signal.SIGTERM)
        tokens += [token async for delta in iterator for token in delta.token_ids]
    assert len(tokens) == 100
    assert await asyncio.to_thread(process.wait, 30) == 0


def test_a_taken_port(random_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = [f"--model={random_folder}", *FEW, f"--port={taken.getsockname()[1]}"]
        done = subprocess.run([*COMMAND, *flags], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "choose another --port" in done.stderr.strip().splitlines()[-1]
