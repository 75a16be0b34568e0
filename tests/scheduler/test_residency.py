"""Tests of where KV goes: small cases on a device that notices every misplaced page."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.device import complete
from support.loop import Loop, make, serve

from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.wait import BoundedWait, Wait

AMPLE = HostTier(pages=100, staging=100)
"""Pages of four tokens."""


def loop_of(strategy="infercept", host=AMPLE, pages=12, **more) -> Loop:
    """``infercept`` moves what is needed and nothing else."""
    return Loop(make("program-fcfs", strategy, num_pages=pages + 1, host=host, **more))


def known(loop, tool, seconds) -> None:
    """A tool has always taken so long."""
    program = Program(0, 0.0, wait=BoundedWait.of(Wait((tool,))))
    for _ in range(40):
        loop.scheduler._policy.predict.returned(program, seconds)


def test_no_pressure_moves_nothing():
    loop = loop_of("adaptive", pages=40)
    for i in range(3):
        serve(loop, f"p{i}", [i] * 13, 3)
    stats = loop.scheduler.stats()
    assert stats.offloaded_pages == stats.dropped_pages == 0
    assert stats.decisions == {"keep: no pressure": 3}


@pytest.mark.parametrize(
    "strategy", ["adaptive", "always-keep", "always-offload", "always-discard", "cachettl", "mori"]
)
def test_every_wait_is_decided_once(strategy):
    """However often the client names its tool meanwhile."""
    loop = loop_of(strategy, pages=14)
    for tool in range(3):
        known(loop, f"t{tool}", 1000.0)
    text = [1] * 9
    for turn in range(4):
        text += [*serve(loop, "p", text, 2).output, turn]
        for tool in range(turn):
            loop.scheduler.waits("p", Wait((f"t{tool}",)), loop.now)
    words = ("keep", "offload", "discard", "evict first")
    decided = {what: n for what, n in loop.scheduler.stats().decisions.items() if what.startswith(words)}
    assert sum(decided.values()) == 4


def test_what_is_needed_moves_and_comes_back():
    loop = loop_of()
    serve(loop, "a", [1] * 21, 3)  # 23 tokens on six pages
    serve(loop, "b", [2] * 40, 1)  # needs ten of twelve
    stats = loop.scheduler.stats()
    assert (stats.offloaded_pages, stats.dropped_pages) == (6, 0)  # copied together; four of them evicted
    back = serve(loop, "a", [1] * 21 + complete([1] * 21, 3) + [5], 2)
    assert back.cached_tokens == 23
    assert back.restore_s > 0
    assert loop.scheduler.stats().restored_pages == 4
    assert loop.scheduler.stats().recomputed_tokens == 0


@pytest.mark.parametrize(
    ("more", "source"),
    [
        ({"pages": 40}, "device"),
        ({}, "host"),
        ({"host": HostTier()}, "recomputed, evicted"),
    ],
)
def test_every_turn_says_where_its_kv_came_from(more, source):
    loop = loop_of(**more)
    serve(loop, "a", [1] * 21, 3)
    serve(loop, "b", [2] * 40, 1)
    serve(loop, "a", [1] * 21 + complete([1] * 21, 3) + [5], 2)
    resumed = {what: n for what, n in loop.scheduler.stats().decisions.items() if what.startswith("resume")}
    assert resumed == {f"resume: {source}": 1}


def test_one_that_is_cancelled_while_its_kv_comes_back_is_not_announced_to_the_device():
    loop = loop_of()
    serve(loop, "a", [1] * 21, 3)
    serve(loop, "b", [2] * 40, 1)
    loop.delay = 3
    back = loop.scheduler.submit([1] * 21 + complete([1] * 21, 3) + [5], 2, program="a", now=loop.now)
    loop.turn()
    assert back.loading is not None
    loop.scheduler.finish(back, "cancelled", loop.now)
    serve(loop, "c", [3] * 4, 1)  # the loop asserts that it hears of live requests only


def test_a_copy_stays_good_for_the_next_time():
    loop = loop_of()
    text = [1] * 21
    for turn in range(3):
        request = serve(loop, "a", text, 3)
        text = [*text, *request.output, 5]
        serve(loop, None, [2 + turn] * 40, 1)
    # The first time six pages were copied; later only those that were written since.
    assert loop.scheduler.stats().offloaded_pages < 6 + 2 * 3


def test_copies_ahead_stay_on_the_device():
    loop = loop_of("adaptive", pages=20)
    loop.scheduler._policy.predict.steps.costs = replace(
        loop.scheduler._policy.predict.costs, per_token_s=1.0
    )  # so that moving is worth it
    serve(loop, "a", [1] * 30, 2)
    serve(loop, "b", [2] * 33, 2)  # 17 of 20 pages are in use now
    before = loop.scheduler.stats()
    assert before.offloaded_pages > 0
    assert before.free_pages == 3
    back = serve(loop, "a", [1] * 30 + complete([1] * 30, 2), 1)
    assert back.cached_tokens == 31
    assert loop.scheduler.stats().restored_pages == 0


def test_staging_bounds_what_is_on_its_way():
    loop = loop_of(host=HostTier(pages=100, staging=2))
    loop.delay = 3
    serve(loop, "a", [1] * 21, 3)
    serve(loop, "b", [2] * 40, 1)
    assert loop.scheduler.stats().dropped_pages == 0  # it waited rather than lose KV
    assert loop.scheduler.stats().offloaded_pages == 4


def test_a_full_host_drops_what_is_idle_longest_to_come():
    loop = loop_of(host=HostTier(pages=6, staging=6))
    known(loop, "slow", 1000.0)
    known(loop, "fast", 10.0)
    serve(loop, "slow", [1] * 21, 3)
    loop.scheduler.waits("slow", Wait(("slow",)), loop.now)
    serve(loop, None, [2] * 40, 1)  # moves "slow" to the host and fills it
    serve(loop, "fast", [3] * 21, 3)
    serve(loop, None, [4] * 40, 1)
    stats = loop.scheduler.stats()
    assert stats.decisions["drop copy: the host is full"] >= 1
    fast = serve(loop, "fast", [3] * 21 + complete([3] * 21, 3), 1)
    assert fast.cached_tokens == 23
    slow = serve(loop, "slow", [1] * 21 + complete([1] * 21, 3), 1)
    assert slow.cached_tokens < 23


def test_shared_pages_are_held_once_and_evicted_last():
    loop = loop_of(pages=16)
    system = list(range(20, 36))  # four full pages
    for i in range(3):
        request = serve(loop, f"p{i}", [*system, i], 2, salt=salted(""))
        assert request.cached_tokens == (16 if i else 0)
    assert loop.scheduler.stats().retained_pages == 4 + 3  # and one page each
    serve(loop, None, [9] * 44, 1)  # eleven of sixteen: the private pages go, then the first two lose the shared ones
    again = serve(loop, "p2", [*system, 2, *complete([*system, 2], 2)], 1, salt=salted(""))
    assert again.cached_tokens >= 16


def test_pages_are_found_after_their_program_has_ended():
    loop = loop_of(pages=40)
    first = serve(loop, "a", [7] * 17, 4, salt=salted("t"))
    loop.scheduler.end_program("a", loop.now)
    assert loop.scheduler.stats().cached_pages == 5
    text = [*([7] * 17), *first.output, 3]
    assert serve(loop, None, text, 1, salt=salted("t")).cached_tokens == 20
    assert serve(loop, None, text, 1, salt=salted("u")).cached_tokens == 0
    assert serve(loop, None, text, 1).cached_tokens == 0


def test_a_text_that_parts_from_a_shared_page_leaves_it_alone():
    loop = loop_of(pages=40)
    text = list(range(10)) + [7] * 10
    serve(loop, "a", text, 1, salt=salted(""))
    serve(loop, "b", text, 1, salt=salted(""))  # shares a's pages
    serve(loop, "b", [*text[:14], 1, 2, 3], 3, salt=salted(""))  # parts in the middle of the fourth page
    back = serve(loop, "a", [*text, *complete(text, 1), 4], 3, salt=salted(""))
    assert back.cached_tokens == 20


def test_a_copy_of_a_part_of_a_page_is_outdated_once_the_page_is_full():
    """Also if it was somebody else who has filled it."""
    loop = loop_of(pages=12)
    start, salt = [1] * 3, salted("")
    serve(loop, "a", start, 1, salt=salt)
    serve(loop, None, [2] * 47, 1)  # a's page goes to the host
    text = [*start, *range(20, 30)]
    serve(loop, "b", text, 1, salt=salt)
    back = serve(loop, "a", [*text, 6], 2, salt=salt)
    assert back.cached_tokens == 12
    serve(loop, None, [2] * 47, 1)
    assert serve(loop, "a", [*text, 6, *back.output, 7], 2, salt=salt).cached_tokens >= 12


@pytest.mark.parametrize("delay", [0, 3])
def test_failed_transfers_are_computed_again(delay):
    loop = loop_of()
    loop.delay = delay
    serve(loop, "a", [1] * 21, 3)
    loop.faults = 1
    serve(loop, "b", [2] * 40, 1)  # its copies of a's pages fail
    back = serve(loop, "a", [1] * 21 + complete([1] * 21, 3) + [5], 2)
    assert back.cached_tokens < 23
    serve(loop, "c", [3] * 40, 1)
    loop.faults = 5
    before = loop.scheduler.stats()
    last = serve(loop, "a", [*back.prompt, *back.output, 6], 2)  # the way back fails
    stats = loop.scheduler.stats()
    assert stats.reused_tokens - before.reused_tokens == last.cached_tokens < len(back.prompt)
    assert stats.recomputed_tokens - before.recomputed_tokens == len(back.prompt) + 1 - last.cached_tokens
    assert loop.scheduler.stats().failed_transfers > 1


@pytest.mark.parametrize("transfers_end", [False, True])
def test_a_lost_device_leaves_what_the_host_holds_from_the_first_token_on(transfers_end):
    loop = loop_of("always-offload", pages=40)
    kept = serve(loop, "kept", [1] * 21, 3)  # six pages, copied
    loop.delay = 50
    serve_more = loop.scheduler.submit([2] * 21, 3, program="under way", now=loop.now)
    while serve_more.finish_reason is None:
        loop.turn()
    running = loop.scheduler.submit([3] * 9, 9, program="running", now=loop.now)
    loop.turn()
    assert loop.lose_device(transfers_end=transfers_end) == [running]
    loop.scheduler.check()
    stats = loop.scheduler.stats()
    assert (stats.free_pages, stats.running, stats.programs) == (40, 0, 3)
    loop.delay = 0
    loop.now += 100
    back = serve(loop, "kept", [*kept.prompt, *kept.output, 5], 2)
    assert back.cached_tokens == 23
    assert serve(loop, "under way", [2] * 21, 3).cached_tokens == 0
    assert serve(loop, "running", [3] * 9, 9).cached_tokens == 0


def test_a_preempted_request_goes_on_after_the_device_was_lost():
    """Its last token was sampled by a step that nobody will read."""
    loop = Loop(make(num_pages=13))
    requests = [loop.scheduler.submit([i] * 8, 30, now=0) for i in range(4)]
    launched = loop.launch()
    while not any(s.num_pending for s in requests if s.preemptions and s.slot < 0):
        loop.commit(launched)
        launched = loop.launch()
    failed = loop.lose_device(transfers_end=True)
    loop.drain()
    for request in requests:
        if request not in failed:
            assert request.output == complete(list(request.prompt), 30)
    assert 0 < len(failed) < 4


@pytest.mark.parametrize("strategy", ["adaptive", "always-keep", "always-offload", "cachettl", "mori"])
def test_no_wish_to_keep_stops_the_others(strategy):
    """The pin deadlock: every page is held by programs that wait, and a new one needs them all."""
    loop = loop_of(strategy, host=HostTier(pages=2, staging=1))
    loop.delay = 2
    for i in range(4):
        serve(loop, f"p{i}", [i] * 11, 2)
    serve(loop, "large", [9] * 44, 3)
    serve(loop, "p0", [0] * 11 + complete([0] * 11, 2), 2)
