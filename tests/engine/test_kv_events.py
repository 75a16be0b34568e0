"""What is told goes through a bounded queue, never waits, and is whole again after something was dropped."""

from __future__ import annotations

import dataclasses

import pytest
from support.kv_listener import Listener, Truth
from support.loop import Loop, make
from support.stub import STUB, stub_engine

from astraea_jax.engine import kv_events
from astraea_jax.engine.kv_events import KVEvents
from astraea_jax.scheduler.kv_log import Cleared
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.transfer import HostTier


@pytest.fixture
def loop():
    return Loop(make("program-fcfs", "infercept", num_pages=33, kv_events=True, host=HostTier(100, 100)))


def work(loop, number: int) -> None:
    loop.scheduler.submit([number] * 21, 3, program=f"p{number}", salt=salted(""), now=loop.now)
    loop.drain()


def taken(events: KVEvents, listener: Listener) -> int:
    """Take all that is there; returns how many turns were missed."""
    missed = 0
    while (told := events.get(0)) is not None:
        assert not told.missed or isinstance(told.records[0], Cleared)
        missed += told.missed
        listener.hear(told.records)
    return missed


def test_it_begins_with_all_that_there_is(loop):
    work(loop, 1)
    events, listener, truth = KVEvents(loop.scheduler.kv_log), Listener(), Truth(loop.scheduler)
    events.collect()
    assert taken(events, listener) == 0
    assert listener.tiers == truth.tiers()
    events.collect()
    assert events.get(0) is None


def test_who_is_slow_misses_turns_and_then_hears_everything(loop, monkeypatch):
    monkeypatch.setattr(kv_events, "MAX_QUEUED", 12)
    events, listener, truth = KVEvents(loop.scheduler.kv_log), Listener(), Truth(loop.scheduler)
    for number in range(9):
        work(loop, number)
        events.collect()
    assert events.dropped > 2
    assert events._queued <= 12
    taken(events, listener)
    assert listener.tiers != truth.tiers()
    events.collect()  # nothing happens any more
    assert taken(events, listener) == events.dropped
    assert listener.tiers == truth.tiers()
    work(loop, 10)
    events.collect()
    assert taken(events, listener) == 0
    assert listener.tiers == truth.tiers()


def test_a_turn_larger_than_the_queue_is_told_when_nothing_waits(loop, monkeypatch):
    monkeypatch.setattr(kv_events, "MAX_QUEUED", 1)
    events, listener, truth = KVEvents(loop.scheduler.kv_log), Listener(), Truth(loop.scheduler)
    work(loop, 1)
    events.collect()
    assert taken(events, listener) == 0
    assert listener.tiers == truth.tiers()


@pytest.mark.parametrize("tells", [False, True])
def test_an_engine_tells_only_if_it_is_to(tells):
    engine, _ = stub_engine(dataclasses.replace(STUB, kv_events=tells))
    engine.kv_events.collect()
    assert (engine.kv_events.get(0) is not None, engine._scheduler.kv_log is not None) == (tells, tells)
