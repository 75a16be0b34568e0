"""The queue's share per client, and a start that crosses an end.

States and ends of requests are the state machine's (test_engine_states.py).
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engines import WAIT_S
from support.scripts import run
from support.stub import stub_engine

from astraea_jax.engine import engine as engines
from astraea_jax.engine.lifecycle import Lifecycle, State
from astraea_jax.engine.shared_bound import RESERVE
from astraea_jax.errors import Overloaded


def serving(max_queued: int) -> Lifecycle:
    life = Lifecycle(max_queued)
    life.compile()
    life.serve()
    return life


def accepted(life: Lifecycle, owner: str, requests: int) -> list[Any]:
    """Ask so often, and return those that were accepted."""
    taken: list[Any] = []
    for _ in range(requests):
        try:
            life.accept(box := object(), owner)
        except Overloaded:
            continue
        taken.append(box)
    return taken


def test_one_client_cannot_fill_the_queue():
    life = serving(16)
    flood = accepted(life, "one", 100)
    assert len(flood) == 12
    assert [len(accepted(life, owner, n)) for owner, n in (("two", 1), ("three", 9))] == [1, 3]
    life.started(flood[0])
    life.end(flood[1])
    assert not accepted(life, "one", 9)  # fourteen wait, with those of others
    assert len(accepted(life, "four", 1)) == 1
    with pytest.raises(Overloaded, match="tenant one has 10 requests waiting, of 3 allowed; 15 wait in all"):
        life.accept(object(), "one")


@pytest.mark.parametrize(("weights", "room"), [({}, 8), ({"two": 2.0}, 9), ({"two": 0.0}, 3), ({"one": 8.0}, 3)])
def test_a_client_has_its_share_of_the_queue_beside_a_flood(weights, room):
    """Of 24 places a flood has taken 15: three quarters are anybody's, and of all a client may have its share."""
    life = Lifecycle(24, weights)
    life.compile()
    life.serve()
    assert len(accepted(life, "one", 15)) == 15
    assert len(accepted(life, "two", 24)) == room


def test_who_watches_hears_of_changes_only():
    """After the last one the event loop that he would be told in may be closed."""
    life, states = Lifecycle(1), []
    life.watch(lambda: states.append(life.state))
    life.compile()
    life.serve()
    for _ in range(2):
        life.drain()
        life.die("the test")
    assert states == [State.COMPILING, State.SERVING, State.DRAINING, State.DEAD]


def test_the_engines_own_process_may_fill_it():
    assert len(accepted(serving(16), "", 100)) == 16


@given(
    max_queued=st.integers(1, 12),
    calls=st.lists(
        st.tuples(st.sampled_from(["accept", "started", "end"]), st.sampled_from("abc"), st.integers(0, 30))
    ),
)
def test_the_books_agree_with_a_list(max_queued, calls):
    life, open_ = serving(max_queued), {}
    for call, owner, which in calls:
        waiting = [of for of, started in open_.values() if not started]
        if call == "accept":
            boxes = accepted(life, owner, 1)
            own, share = waiting.count(owner) + 1, max_queued / (len({*waiting}) + 1)
            may = own == 1 or own <= share or len(waiting) < max_queued - max_queued // RESERVE
            assert bool(boxes) == (may and len(waiting) < max_queued)
            open_.update(dict.fromkeys(boxes, (owner, False)))
        elif open_:
            box = list(open_)[which % len(open_)]
            if call == "started":
                life.started(box)
                open_[box] = open_[box][0], True
            else:
                assert life.end(box)
                assert not life.end(box)
                del open_[box]
        assert life.in_progress == len(open_)


def test_an_engine_that_is_shut_down_while_its_loop_is_being_started_leaves_no_loop_behind():
    engine, _ = stub_engine()
    serve = engine._life.serve

    def cross() -> None:
        serve()
        engine.shutdown(0)

    engine._life.serve = cross
    engine.start()
    engine._thread.join(WAIT_S)
    assert not engine._thread.is_alive()
    assert not engine.live


def test_a_shutdown_waits_for_the_watchdog_too(monkeypatch):
    """The last thread to hold an engine lets go of its arrays; while the interpreter ends, that aborts the process."""

    def slow(thread, *_) -> None:
        thread.join()
        time.sleep(0.2)

    monkeypatch.setattr(engines, "watch", slow)
    monkeypatch.setattr(engines, "STOP_S", WAIT_S)
    engine, _ = stub_engine()
    engine.start()
    engine.shutdown(0)
    assert not engine._watchdog.is_alive()


ENDS = """
import asyncio, atexit, sys, threading, time
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))  # registered first, called last
sys.path.insert(0, "tests")
from support.stub import stub_engine
from astraea_jax.engine import engine as engines
from astraea_jax.engine.sampling import SamplingParams
engine, runner = stub_engine()
engine.start()
print(len(threading.enumerate()))
"""

IN_A_STEP = """
engines.STOP_S = 0.05
read, began = runner.read, threading.Event()
def slow(step):
    began.set()
    time.sleep(0.5)
    return read(step)
runner.read = slow
async def ask():
    kept.append(engine.generate([1, 2, 3], SamplingParams(max_tokens=9)))
kept = []
asyncio.run(ask())
began.wait()
"""


@pytest.mark.parametrize("more", ["", IN_A_STEP], ids=["idle", "in a step longer than a shutdown waits"])
def test_an_interpreter_that_ends_stops_an_engine_that_serves(more):
    assert run("-c", ENDS + more).split("\n")[-3:] == ["3", "['MainThread']", ""]
