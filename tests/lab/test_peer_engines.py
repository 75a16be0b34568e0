"""Loads and how they are served, by generators that can be predicted and by the real process of our engine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.lab.peer_engines import ENGINES, Load, Request, Setup, serve
from astraea_jax.lab.peer_process import RECIPES, PeerError, PeerProcess

TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=5)


def made_of(prompt, count):
    return [(sum(prompt) + i) % 100 for i in range(count)]


@given(
    programs=st.lists(st.lists(TOKENS, min_size=1, max_size=4), min_size=1, max_size=4),
    output=st.integers(1, 5),
    at_once=st.integers(1, 3),
)
def test_every_turn_goes_on_from_the_tokens_before_it(programs, output, at_once):
    asked: dict[str, list[Request]] = {}

    async def generate(request):
        asked.setdefault(request.program, []).append(request)
        made = made_of(request.prompt, request.output)
        for i in range(0, len(made), at_once):
            await asyncio.sleep(0)
            yield made[i : i + at_once]

    served = asyncio.run(serve(generate, Load(programs, [output] * len(programs)), "load"))
    assert len(asked) == len(programs)
    for turns, requests, given_tokens in zip(programs, asked.values(), served.tokens):
        context: list[int] = []
        expected: list[int] = []
        for new, request in zip(turns, requests, strict=True):
            context += new
            assert request.prompt == context
            made = made_of(context, output)
            context, expected = context + made, expected + made
        assert given_tokens == expected
        assert [request.last for request in requests] == [False] * (len(turns) - 1) + [True]
    assert len(served.ttft) == sum(map(len, programs))
    assert served.seconds == max(served.jct)
    assert all(0 <= ttft <= served.seconds for ttft in served.ttft)


@pytest.mark.parametrize("made", [0, 3, 5])
def test_an_engine_that_makes_another_number_of_tokens_is_no_measurement(made):
    async def generate(_):
        for i in range(made):
            yield [i]

    with pytest.raises(RuntimeError, match=f"{made} tokens came, 4 were asked for"):
        asyncio.run(serve(generate, Load([[[1]]], [4]), "load"))


def test_how_to_install_every_engine_is_known():
    assert set(RECIPES) == set(ENGINES)


@pytest.fixture
def setup(random_folder):
    return Setup(str(random_folder), "float32", max_seqs=4, pool_tokens=128, max_context=64, host_bytes=0)


@pytest.fixture
def start(setup, tmp_path):
    started = []

    def start(name, python=sys.executable):
        process = PeerProcess(name, python, setup, tmp_path)
        started.append(process)
        return process

    yield start
    for process in started:
        process.end()


def test_our_engine_serves_loads_in_its_process(start):
    process = start("astraea")
    ready = process.ready(300)
    assert ready.start_s > 0
    load = Load([[[5, 6, 7], [8]], [[9, 10], [11, 12]], [[5, 6, 7], [8]]], [4, 3, 4])
    process.pause()
    with pytest.raises(PeerError, match="nothing after"):
        process.serve(load, 0.2)
    with process.running():  # it was told while it was paused
        first, second = process.answer(60), process.serve(load, 60)
    assert [len(tokens) for tokens in first.tokens] == [8, 6, 8]
    assert first.tokens[0] == first.tokens[2]
    assert first.tokens == second.tokens
    with process.running(), pytest.raises(PeerError, match=r"ended.*64"):
        process.serve(Load([[[1] * 65]], [1]), 60)


def test_what_is_not_installed_is_named_with_its_recipe(start):
    with pytest.raises(PeerError, match=r"not installed \(no package xllamacpp\): pip install xllamacpp"):
        start("llama.cpp").ready(60)
    with pytest.raises(PeerError, match="/nowhere/python does not run: No such file"):
        start("vllm", "/nowhere/python")


@pytest.fixture
def python(tmp_path):
    """Write a program that stands where a Python should."""

    def write(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return write


READY = """echo '{"version": "1", "note": "", "start_s": 1.0}'"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "ended"),
        ("echo oops >&2; exit 3", "ended; it wrote last: oops"),
        ("echo hello; sleep 60", "answered b'hello'"),
        ("echo '[1]'; sleep 60", r"answered b'\[1\]'"),
        ("""echo '{"version": "1"}'; sleep 60""", "answered {'version': '1'}"),
        ("echo -n '{'; sleep 60", "nothing after 1 s"),
    ],
)
def test_a_python_that_is_none_is_told(start, python, script, said):
    with pytest.raises(PeerError, match=said):
        start("vllm", python(script)).ready(1 if "nothing after" in said else 60)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("read load; echo boom >&2; exit 3", "ended; it wrote last: boom"),
        ("read load; echo '{}'; sleep 60", "answered {}"),
        ("sleep 60", "nothing after 1 s"),  # the load is more than its pipe holds
    ],
)
def test_an_engine_that_fails_at_a_load_is_told(start, python, script, said):
    process = start("vllm", python(f"{READY}; {script}"))
    process.ready(60)
    with process.running(), pytest.raises(PeerError, match=said):
        process.serve(Load([[[1] * 100_000]], [1]), 1 if "nothing after" in said else 60)


def test_the_end_waits_for_nothing_that_has_left_its_group(start, python, tmp_path):
    written = tmp_path / "left"
    leave = f"setsid sh -c 'echo $$ > {written}; exec sleep 60' &"  # it writes only when it has left
    wait = f"while [ ! -s {written} ]; do sleep 0.01; done"
    process = start("vllm", python(f"{leave}\n{wait}\n{READY}; sleep 60"))
    process.ready(60)
    process.end()
    left = int(written.read_text())
    os.kill(left, signal.SIGKILL)  # it was still there
