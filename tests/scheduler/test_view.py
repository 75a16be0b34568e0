"""Pictures of programs: their states, where their KV is, whose they are, and how many are shown."""

from __future__ import annotations

import pytest
from support.loop import Loop, make

from astraea_jax.scheduler.histogram import Histogram
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.wait import Wait


def look(loop, limit=100, owner=None):
    return loop.scheduler.look(limit, owner, loop.now)


def test_a_program_is_seen_in_every_state():
    loop = Loop(make("program-fcfs", max_seqs=1, max_step_tokens=4))
    loop.scheduler.submit([1] * 6, 3, program="a", now=loop.now)
    loop.scheduler.submit([2] * 6, 3, program="b", now=loop.now)
    seen = {"a": [], "b": []}
    while any(view.state != "tool_wait" for view in look(loop)):
        for view in look(loop):
            if seen[view.key][-1:] != [view.state]:
                seen[view.key].append(view.state)
        loop.turn()
    assert seen["a"] == ["queued", "prefill", "decode", "tool_wait"]
    assert seen["b"][:3] == ["queued", "prefill", "decode"]
    assert {(view.turns, view.tokens, view.residency) for view in look(loop)} == {(1, 9, "device")}


def test_what_a_program_waits_for():
    loop = Loop(make("program-fcfs"))
    loop.scheduler.submit([1] * 6, 3, program="a", now=loop.now)
    loop.drain()
    seen = []
    for wait in (Wait(("x", "y")), Wait(("z" * 200,) * 100), Wait()):
        loop.scheduler.waits("a", wait, loop.now)
        [view] = look(loop)
        seen.append((view.state, view.tool))
    assert seen == [("tool_wait", "x+y"), ("tool_wait", ("z" * 200 + "+" + "z" * 55)), ("human_wait", None)]


def test_where_kv_is():
    loop = Loop(make("program-fcfs", "always-offload", num_pages=40, host=HostTier(40, 16)))
    loop.scheduler.submit([1] * 20, 2, program="a", now=loop.now)
    loop.drain()
    [view] = look(loop)
    assert view.device_pages + view.host_pages > 0
    assert (
        view.residency
        == {(True, True): "both", (True, False): "device", (False, True): "host"}[
            view.device_pages > 0, view.host_pages > 0
        ]
    )


@pytest.mark.parametrize("limit", [0, 1, 3, 100])
def test_one_owner_and_no_more_than_the_limit(limit):
    loop = Loop(make("program-fcfs"))
    for number in range(6):
        owner = "ab"[number % 2]
        loop.scheduler.submit([number] * 3, 2, program=(owner, str(number)), owner=owner, now=loop.now)
        if number < 4:
            loop.drain()
    assert len(look(loop, limit)) == min(6, limit)
    of_a = look(loop, limit, "a")
    assert [view.key[1] for view in of_a] == ["4", "2", "0"][:limit]
    assert all(view.key[0] == "a" for view in of_a)
    assert look(loop, limit, "nobody") == []


def test_buckets_hold_what_is_at_most_their_bound():
    histogram = Histogram((1, 2))
    for value in (0, 1, 1.5, 2, 3):
        histogram.add(value)
    histogram.add(5, 3)
    assert (histogram.counts, histogram.sum) == ([2, 2, 4], 22.5)
