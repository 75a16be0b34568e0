"""An event loop that blocking callers share: nobody is left waiting, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from support.engines import WAIT_S
from support.scripts import run

from astraea_jax.engine.engine import ENGINE_THREAD
from astraea_jax.errors import EngineDead
from astraea_jax.frontends import loop_thread
from astraea_jax.frontends.loop_thread import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("test-loop")
    yield thread
    thread.stop()
    assert not thread.is_alive()


async def forever() -> None:
    await asyncio.sleep(3600)


def waiting(loop: LoopThread, work=forever) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that waits for ``work``, and where its error will be."""
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            loop.wait_for(work)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    while not loop._calls:
        time.sleep(0.002)
    return thread, errors


async def answer() -> int:
    return 42


async def fail() -> None:
    raise LookupError("no")


def test_results_and_errors_come_back(loop):
    assert loop.wait_for(answer) == 42
    with pytest.raises(LookupError, match="no"):
        loop.wait_for(fail)
    assert not loop._calls


def test_it_refuses_to_wait_for_itself_or_another_of_its_kind(loop):
    other = LoopThread("other")

    async def wait_for_other() -> int:
        return other.wait_for(answer)

    with pytest.raises(RuntimeError, match="plain function"):
        loop.wait_for(wait_for_other)
    other.stop()


def test_stopping_lets_every_caller_go(loop):
    callers = [waiting(loop) for _ in range(5)]
    loop.stop()
    loop.stop()
    for thread, errors in callers:
        thread.join(WAIT_S)
        assert [type(error) for error in errors] == [EngineDead]
    with pytest.raises(EngineDead, match="closed"):
        loop.wait_for(answer)


def test_stopping_waits_until_what_was_cancelled_has_ended(loop):
    begun, ended = threading.Event(), []

    async def slow_to_end() -> None:
        begun.set()
        try:
            await forever()
        finally:
            await asyncio.sleep(0.05)
            ended.append(True)

    waiting(loop, slow_to_end)
    assert begun.wait(WAIT_S)
    loop.stop()
    assert ended


INTERRUPTED = """
import asyncio, random, signal, sys, time
from astraea_jax.frontends.loop_thread import LoopThread

loop, choose, left, running = LoopThread("test-loop"), random.Random(int(sys.argv[1])), 0, []

def interrupt(_, frame):
    global left
    left -= 1
    if left <= 0:
        signal.setitimer(signal.ITIMER_REAL, 0)
    while left >= 0 and frame is not None:  # one more may have been on its way
        if frame.f_code is LoopThread.wait_for.__code__:
            raise KeyboardInterrupt
        frame = frame.f_back

async def work():
    running.append(True)
    try:
        await asyncio.sleep(0.002)
    finally:
        running.pop()

async def answer():
    return 42

signal.signal(signal.SIGALRM, interrupt)
for _ in range(300):
    left = choose.choice([1, 2, 3])
    signal.setitimer(signal.ITIMER_REAL, choose.uniform(2e-5, 3e-3), choose.uniform(1e-5, 2e-4))
    try:
        loop.wait_for(work)
    except KeyboardInterrupt:
        pass
    while left > 0:
        time.sleep(1e-4)
    assert loop.wait_for(answer) == 42
while running:
    time.sleep(0.002)
"""
"""Up to three interrupts in quick succession, raised within ``wait_for`` only."""


@pytest.mark.parametrize("seed", range(3))
def test_interrupts_may_come_at_any_instant_in_any_number(seed):
    """None leaves a lock taken or a coroutine running for whoever comes next."""
    run("-c", INTERRUPTED, str(seed))


def test_an_interrupt_does_not_wait_for_an_event_loop_that_is_blocked(loop, monkeypatch):
    monkeypatch.setattr(loop_thread, "STOP_S", 0.05)
    let_go = threading.Event()

    async def blocks() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        let_go.wait()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.wait_for(blocks)
    finally:
        signal.signal(signal.SIGINT, before)
        let_go.set()


def test_an_engines_own_thread_is_told_not_to_wait(loop):
    """There a destructor runs if Python collects garbage there."""
    errors = []

    def destructor() -> None:
        try:
            loop.wait_for(answer)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=destructor, name=ENGINE_THREAD)
    thread.start()
    thread.join(WAIT_S)
    assert ["destructor" in error for error in errors] == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_breaks_the_event_loop_lets_every_caller_go(loop, kind):
    async def breaks() -> None:
        raise kind

    thread, errors = waiting(loop)
    with pytest.raises(kind):
        loop.wait_for(breaks)
    thread.join(WAIT_S)
    assert [type(error) for error in errors] == [EngineDead]
    with pytest.raises(EngineDead, match="closed"):
        loop.wait_for(answer)


def test_a_blocked_event_loop_holds_nobody(monkeypatch, caplog):
    monkeypatch.setattr(loop_thread, "STOP_S", 0.05)
    loop, begun, let_go = LoopThread("blocked"), threading.Event(), threading.Event()

    async def blocks() -> None:
        begun.set()
        let_go.wait()

    thread, errors = waiting(loop, blocks)
    assert begun.wait(WAIT_S)
    loop.stop()
    thread.join(WAIT_S)
    assert [type(error) for error in errors] == [EngineDead]
    assert "left behind" in caplog.text
    let_go.set()
    loop.join(WAIT_S)
    assert not loop.is_alive()
