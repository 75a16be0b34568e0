"""The scheduler against a device that notices every misplaced page, one commit late as in the engine."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
from hypothesis import settings
from support.device import complete
from support.loop import Loop, make
from support.scheduler_states import Machine

from astraea_jax.scheduler.policies import SERVING
from astraea_jax.scheduler.program import DEFER_S, Program, Request
from astraea_jax.scheduler.scheduler import Scheduler
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.wait import Wait

TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_equal_inputs_give_equal_plans():
    def logs():
        loop, rng = Loop(make("program-fcfs")), random.Random(5)
        for i in range(40):
            loop.scheduler.submit([rng.randrange(9)] * rng.randint(1, 25), 12, program=f"p{i}", now=loop.now)
            loop.turn()
        loop.drain()
        return loop.log

    assert logs() == logs()


def test_decode_goes_on_while_a_long_prompt_is_prefilled():
    loop = Loop(make(num_pages=40))
    first = loop.scheduler.submit([1, 2], 20, now=0)
    loop.turn()
    loop.scheduler.submit([3] * 40, 2, now=0)
    before = len(first.output)
    for _ in range(4):
        loop.turn()
    assert len(first.output) == before + 4
    assert max(count for step in loop.log for *_, count, _ in step) <= 11  # a chunk leaves room for the decode


def test_the_first_in_order_is_never_preempted():
    loop = Loop(make(num_pages=13))
    requests = [loop.scheduler.submit([i] * 8, 30, now=0) for i in range(4)]
    loop.drain()
    assert requests[0].preemptions == 0
    assert loop.scheduler.stats().preemptions > 0
    assert [s.finish_reason for s in requests] == ["length"] * 4


def test_the_first_that_does_not_fit_is_skipped_a_few_times_only():
    scheduler = make(num_pages=9, max_seqs=8)
    scheduler._policy.backfill, scheduler._policy.max_skips = 3, 2
    loop = Loop(scheduler)
    scheduler.submit([1] * 12, 12, now=0)
    loop.turn()
    large = scheduler.submit([2] * 24, 2, now=0)
    small = [scheduler.submit([3], 1, now=0) for _ in range(3)]
    loop.turn()
    assert [s.slot >= 0 for s in (large, *small)] == [False, True, True, False]
    assert large.skipped == 2
    loop.drain()
    served = [number for step in loop.log for number, *_ in step]
    assert served.index(large.number) < served.index(small[2].number)


def test_program_order_lets_a_returning_program_go_first():
    def order(policy: str, wait: Wait) -> list[str]:
        loop = Loop(make(policy, max_seqs=1))
        loop.scheduler.submit([1, 2, 3], 2, program="old", now=0)
        loop.drain()
        loop.scheduler.waits("old", wait, loop.now)
        loop.scheduler.submit([7] * 5, 9, program="running", now=loop.now)
        loop.turn()
        loop.scheduler.submit([9] * 3, 2, program="new", now=loop.now)
        loop.turn()
        back = loop.scheduler.submit([1, 2, 3, 4], 2, program="old", now=loop.now)
        loop.drain()
        served = [number for step in loop.log for number, *_ in step]
        return ["old" if n == back.number else "new" for n in dict.fromkeys(served) if n > 2]

    assert order("fcfs", Wait(("t",))) == ["new", "old"]
    assert order("program-fcfs", Wait(("t",))) == ["old", "new"]
    assert order("program-fcfs", Wait()) == ["new", "old"]  # another job has another place


def test_a_returning_program_computes_only_what_is_new():
    loop = Loop(make(num_pages=40))
    first = loop.scheduler.submit([1, 2, 3, 4, 5], 6, program="p", now=0)
    loop.drain()
    prompt = [*first.prompt, *first.output, 9, 9]
    second = loop.scheduler.submit(prompt, 3, program="p", now=loop.now)
    loop.drain()
    assert second.output == complete(prompt, 3)
    assert second.cached_tokens == 10  # the last of eleven tokens was sampled but never fed back


def test_under_pressure_the_longest_wait_gives_pages_first_and_from_the_end():
    loop = Loop(make(num_pages=9))
    for name in ("a", "b"):
        loop.scheduler.submit([1] * 13, 3, program=name, now=loop.now)
        loop.drain()
    assert loop.scheduler.stats().free_pages == 0
    loop.scheduler.submit([2] * 5, 3, now=loop.now)
    loop.drain()
    assert loop.scheduler.stats().dropped_pages == 2
    back = {name: loop.scheduler.submit([1] * 14, 1, program=name, now=loop.now) for name in ("b", "a")}
    loop.drain()
    assert back["b"].cached_tokens == 13
    assert back["a"].cached_tokens == 8


def test_a_token_the_device_could_not_choose_ends_the_request():
    scheduler = make()
    request = scheduler.submit([1], 5, program="p", now=0)
    plan = scheduler.plan(0)
    assert scheduler.commit(plan, [-1], 0) == ([request], [-1])
    assert request.finish_reason == "error"
    assert scheduler.stats().retained_pages == 0
    scheduler.check()


def in_step(count: int = 3, **changes) -> tuple[Scheduler, list[Request]]:
    """Requests that decode side by side."""
    scheduler = make(num_pages=40, **changes)
    requests = [scheduler.submit([1], 5, frozenset({90 + i}), now=0) for i in range(count)]
    scheduler.commit(scheduler.plan(0), [7] * count, 1)
    return scheduler, requests


def test_a_stop_of_another_request_ends_nobody():
    scheduler, requests = in_step()
    assert scheduler.commit(scheduler.plan(2), [91, 91, 90], 3) == (requests, [91, 91, 90])
    assert [r.finish_reason for r in requests] == [None, "stop", None]
    assert [r.output for r in requests] == [[7, 91], [7, 91], [7, 90]]
    scheduler.check()
    assert scheduler.commit(scheduler.plan(4), [91, 92], 5) == ([requests[0], requests[2]], [91, 92])
    assert [r.finish_reason for r in requests] == [None, "stop", "stop"]  # whose stop 91 was, is gone
    scheduler.finish(requests[0], "cancelled", 6)
    scheduler.check()


def test_rows_of_requests_that_have_ended_since_are_left_out():
    scheduler, requests = in_step()
    first, second = scheduler.plan(2), scheduler.plan(3)
    scheduler.finish(requests[1], "cancelled", 3)
    assert scheduler.commit(first, [8, 8, 92], 4) == ([requests[0], requests[2]], [8, 92])
    assert scheduler.commit(second, [9, 9, 9], 5) == ([requests[0]], [9])
    assert [r.output for r in requests] == [[7, 8, 9], [7], [7, 92]]
    third = scheduler.plan(6)
    assert third.requests == [requests[0]]
    assert not third.ended


def test_the_first_token_has_its_time_and_one_that_could_not_be_chosen_none():
    scheduler = make()
    good, bad = (scheduler.submit([1], 5, now=0) for _ in range(2))
    scheduler.commit(scheduler.plan(0), [7, -1], 1)
    scheduler.commit(scheduler.plan(2), [8], 3)
    assert (good.first_token, good.output) == (1, [7, 8])
    assert (bad.first_token, bad.output, bad.finish_reason) == (None, [], "error")


def test_requests_end_with_their_last_token_together():
    scheduler, requests = in_step()
    for now in (2, 3, 4):
        scheduler.commit(scheduler.plan(now), [7] * 3, now)
        assert {r.finish_reason for r in requests} == {None}
    plan = scheduler.plan(5)
    assert plan.last == [0, 1, 2]
    assert scheduler.plan(6) is None
    scheduler.commit(plan, [7] * 3, 7)
    assert {r.finish_reason for r in requests} == {"length"}
    scheduler.check()


def test_as_many_tokens_as_rows_are_committed():
    scheduler, _ = in_step()
    with pytest.raises(ValueError, match="2 tokens for 3 rows"):
        scheduler.commit(scheduler.plan(2), [7, 7], 3)


def test_ending_a_program_returns_its_live_request():
    scheduler = make()
    request = scheduler.submit([1], 5, program="p", now=0)
    assert scheduler.end_program("p", 0) is request
    assert request.finish_reason == "cancelled"
    assert scheduler.end_program("p", 0) is None
    scheduler.check()


def test_copied_tokens_mark_what_only_the_device_knows():
    request = make().submit([1, 2, 3], 5, now=0)
    request.output += [4, 5]
    request.num_at_start = 6
    out = np.zeros(5, np.int32)
    request.copy_tokens(1, out)
    assert out.tolist() == [2, 3, 4, 5, -1]
    request.copy_tokens(4, out[:2])
    assert out[:2].tolist() == [5, -1]


def test_programs_are_classed_by_what_their_requests_cost():
    loop = Loop(make(num_pages=60))
    for n in range(3):
        loop.scheduler.submit([n] * 4, 2, program=f"small{n}", now=loop.now)
        loop.drain()
    assert loop.scheduler.stats().io_intensive == 3
    loop.scheduler.submit([9] * 40, 4, program="large", now=loop.now)
    loop.drain()
    stats = loop.scheduler.stats()
    assert (stats.programs, stats.io_intensive) == (4, 3)


@pytest.mark.parametrize("policy", SERVING)
@pytest.mark.parametrize("strategy", [None, "adaptive"])
def test_programs_that_have_ended_are_forgotten(policy, strategy):
    """However long it serves under pressure, a scheduler holds what lives, and nothing else."""
    loop = Loop(make(policy, strategy, host=HostTier(pages=12, staging=3)))
    for i in range(60):
        for turn in range(2):
            loop.scheduler.submit([i] * (20 + turn), 6, program=i, owner=loop, final=turn == 1, now=loop.now)
            loop.drain()
    loop.scheduler.submit([1], 40, now=loop.now)  # takes the place of everybody in what looks at the last steps
    loop.drain()
    loop.slots.clear()
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is Program and x.owner is loop]


def served(loop):
    """Numbers of the requests that have run, in order of their first step."""
    return list(dict.fromkeys(number for step in loop.log for number, *_ in step))


@pytest.mark.parametrize("policy", SERVING)
def test_a_lower_priority_starts_after_the_others(policy):
    loop = Loop(make(policy, max_seqs=1, num_pages=60))
    running = loop.scheduler.submit([1] * 4, 6, now=loop.now)
    loop.turn()
    priorities = {
        loop.scheduler.submit([n] * 4, 2, priority=p, now=loop.now).number: p for n, p in enumerate((1, 0, 9, -5))
    }
    loop.drain()
    assert served(loop)[0] == running.number
    assert [max(0, priorities[n]) > 0 for n in served(loop)[1:]] == [False, False, True, True]


def test_a_lower_priority_does_not_starve():
    loop = Loop(make(max_seqs=1, num_pages=60))
    loop.scheduler.submit([1] * 4, 3, now=loop.now)
    later = loop.scheduler.submit([2] * 4, 2, priority=1, now=loop.now)
    while loop.scheduler.stats().waiting < 3 or later.slot < 0:
        loop.scheduler.submit([3] * 4, 3, now=loop.now)
        loop.turn()
        assert loop.now < DEFER_S + 20
    assert loop.now > DEFER_S
    assert not later.deferred


def test_who_started_with_a_lower_priority_is_preempted_first():
    loop = Loop(make(num_pages=9))
    later = loop.scheduler.submit([1] * 8, 20, priority=1, now=loop.now)
    loop.turn()
    first = loop.scheduler.submit([2] * 8, 20, now=loop.now)
    loop.drain()
    assert (first.preemptions, later.preemptions > 0) == (0, True)
    assert later.output == complete([1] * 8, 20)
