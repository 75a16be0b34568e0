"""Tests of what the scheduler refuses, and of the bounds on what it remembers."""

from __future__ import annotations

import pytest
from support.loop import Loop, make

from astraea_jax.scheduler.program import QueueFull, Rejected


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 1, "at least 1"),
        ([1], 0, "at least 1"),
        ([1] * 40, 9, "40 tokens and max_tokens 9 exceed the 48"),
    ],
)
def test_requests_that_can_never_run_are_refused(prompt, max_tokens, words):
    with pytest.raises(Rejected, match=words):
        make().submit(prompt, max_tokens, now=0)


def test_a_request_larger_than_the_whole_pool_is_refused():
    with pytest.raises(Rejected, match="exceed the 16 that fit"):
        make(num_pages=5).submit([1] * 15, 2, now=0)


def test_a_program_has_one_request_at_a_time():
    scheduler = make()
    scheduler.submit([1], 1, program="p", now=0)
    with pytest.raises(QueueFull, match="this session has a request"):
        scheduler.submit([1], 1, program="p", now=0)


def test_queue_and_table_are_bounded():
    scheduler = make(max_waiting=2)
    for _ in range(2):
        scheduler.submit([1], 1, now=0)
    with pytest.raises(QueueFull, match="2 requests"):
        scheduler.submit([1], 1, now=0)
    scheduler.plan(0)
    scheduler.submit([1], 1, now=0)
    loop = Loop(make(max_programs=2))
    for name in "ab":
        loop.scheduler.submit([1], 1, program=name, now=0)
    with pytest.raises(QueueFull, match="2 programs"):
        loop.scheduler.submit([1], 1, program="c", now=0)
    loop.drain()
    loop.scheduler.submit([1], 1, program="c", now=0)  # the longest idle makes room
    loop.scheduler.check()
    assert loop.scheduler.stats().expired == 1


def test_requests_that_were_preempted_come_back_beyond_the_bound():
    loop = Loop(make(num_pages=13, max_waiting=1))
    for i in range(3):
        loop.scheduler.submit([i] * 8, 30, now=0)
        loop.turn()
    while not (preempted := loop.scheduler.stats().waiting):
        loop.turn()
    loop.scheduler.submit([9] * 8, 30, now=0)
    assert loop.scheduler.stats().waiting == preempted + 1
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        loop.scheduler.submit([9] * 8, 30, now=0)
    loop.drain()
    loop.scheduler.check()


def test_idle_sessions_expire():
    loop = Loop(make(session_ttl_s=10))
    loop.scheduler.submit([1] * 9, 1, program="p", now=0)
    loop.drain()
    assert loop.scheduler.stats().retained_pages == 3
    loop.scheduler.expire(loop.now + 6)
    assert loop.scheduler.stats().programs == 1
    loop.scheduler.expire(loop.now + 11)
    stats = loop.scheduler.stats()
    assert (stats.programs, stats.expired, stats.retained_pages) == (0, 1, 0)
