"""What a scheduler says of its load: contexts, and how long a new request would wait."""

from __future__ import annotations

import pytest
from support.loop import Loop, make

from astraea_jax.scheduler.contexts import HALF_LIFE_S, Contexts
from astraea_jax.scheduler.load import together
from astraea_jax.scheduler.placement import MOST, Report
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.start_waits import StartWaits


def submit(loop: Loop, name: str | None, prompt: list[int], max_tokens: int, **more) -> None:
    loop.scheduler.submit(prompt, max_tokens, program=name, now=loop.now, **more)


def test_contexts_fade_while_their_programs_wait():
    contexts, one, two = Contexts(), Program(1, 0.0), Program(2, 0.0)
    contexts.works(one, 100, 0.0)
    contexts.waits(two, 40, 0.0)
    assert (contexts.active, contexts.waiting, contexts.faded(HALF_LIFE_S)) == (100, 40, 20)
    contexts.waits(one, 120, HALF_LIFE_S)
    assert (contexts.active, contexts.waiting) == (0, 160)
    assert contexts.faded(2 * HALF_LIFE_S) == pytest.approx(10 + 60)
    contexts.works(two, 50, 2 * HALF_LIFE_S)
    assert (contexts.active, contexts.waiting) == (50, 120)
    assert contexts.faded(2 * HALF_LIFE_S) == pytest.approx(60)
    contexts.forget(one)
    contexts.forget(one)
    assert contexts.waiting == 0
    assert contexts.faded(3 * HALF_LIFE_S) == pytest.approx(0.0)
    contexts.check({two})


def test_a_clock_that_runs_back_fades_nothing():
    contexts, program = Contexts(), Program(0, 0.0)
    contexts.waits(program, 64, 1e9)
    contexts.works(program, 80, 0.0)
    contexts.waits(program, 80, 0.0)
    assert contexts.faded(0.0) == contexts.faded(1e9) == 80
    contexts.forget(program, 1.0)
    assert contexts.faded(1e9) == contexts.waiting == 0


def test_live_contexts_count_what_runs_what_waits_and_what_is_queued():
    loop = Loop(make(num_pages=13, max_seqs=1))
    submit(loop, "a", [1] * 8, 4)
    submit(loop, "b", [2] * 9, 4)
    assert loop.scheduler.report(loop.now).live == 8 + 9
    loop.drain()
    report = loop.scheduler.report(loop.now)
    assert (report.live, report.tool_waits, report.waiting) == (8 + 4 + 9 + 4, 2, 0)
    loop.now += HALF_LIFE_S
    later = loop.scheduler.report(loop.now)
    assert later.live == 25
    assert later.demand == pytest.approx(report.demand / 2)
    loop.scheduler.end_program("a", loop.now)
    assert loop.scheduler.report(loop.now).live == 13


def test_a_common_beginning_counts_once_as_long_as_anybody_has_it():
    """Else a hundred agents with one long system prompt would look like a fleet that must grow."""
    loop, system = Loop(make(num_pages=41, max_seqs=4)), [7] * 16
    for name in "abc":
        submit(loop, name, [*system, ord(name) % 50], 2, salt=salted(""))
        loop.drain()
    assert loop.scheduler.report(loop.now).live == 16 + 3 * (19 - 16)
    loop.scheduler.end_program("a", loop.now)
    assert loop.scheduler.report(loop.now).live == 16 + 2 * (19 - 16)
    submit(loop, "b", [9] * 5, 2, salt=salted(""))  # it has been compacted, and begins otherwise
    loop.drain()
    assert loop.scheduler.report(loop.now).live == 19 + 7
    loop.scheduler.end_program("c", loop.now)
    assert loop.scheduler.report(loop.now).live == 7


def test_a_fork_counts_before_it_has_said_anything():
    loop = Loop(make(num_pages=41, max_seqs=4))
    submit(loop, "parent", [7] * 18, 3, salt=salted(""))
    loop.drain()
    assert loop.scheduler.report(loop.now).live == 21
    loop.scheduler.branches.fork("parent", "child", loop.now)
    assert loop.scheduler.report(loop.now).live == 22, "the last token of each is not computed yet"
    loop.scheduler.end_program("parent", loop.now)
    assert loop.scheduler.report(loop.now).live == 21


def test_the_wait_of_a_new_request_grows_with_the_queue():
    waits = StartWaits()
    assert waits.expected(5) == (0.0,) * 10
    for _ in range(200):
        waits.observe(2.0, 1, 1.0)
    assert waits.expected(1) == pytest.approx([2.0] * 10)
    assert waits.expected(3) == pytest.approx([6.0] * 10)


def test_waits_are_learned_by_the_work_that_is_left():
    """As under a policy that starts short programs first."""
    waits = StartWaits()
    for i in range(2000):
        long = i % 2
        waits.observe(8.0 if long else 1.0, 1, 100.0 + i % 7 if long else 1.0 + i % 7)
    expected = waits.expected(1)
    assert list(expected) == sorted(expected)
    assert 1.0 < expected[0] < 3.0 < 6.0 < expected[-1] < 8.0, "each is drawn to the mean of all"


def test_nobody_waits_where_there_is_room():
    loop = Loop(make(num_pages=13, max_seqs=2))
    for name in "abcd":
        submit(loop, name, [1] * 8, 4)
        loop.now += 1.0
    loop.now += 5.0
    loop.drain()
    idle = loop.scheduler.report(loop.now)
    assert idle.wait_s == (0.0,) * 10
    for name in "efg":
        submit(loop, name, [1] * 8, 4)
    loop.turn()
    assert loop.scheduler.report(loop.now).wait_s[0] > 0


def test_reports_of_replicas_add_up():
    common = {"host_free": 0, "retained": 4, "demand": 2.5, "running": 1, "waiting": 2, "tool_waits": 3}
    times = {"prefill_s": 0.1, "restore_s": 0.3}
    one = Report(pool=40, free=10, live=20, wait_s=(1.0,) * 10, step_s=0.2, sessions=2, **common, **times)
    two = Report(pool=40, free=30, live=10, wait_s=(0.5,) * 9 + (3.0,), step_s=0.4, draining=True, **common, **times)
    both = together([one, two])
    assert (both.pool, both.free, both.live, both.demand, both.sessions) == (80, 40, 30, 5.0, 2)
    assert both.step_s == pytest.approx(0.3)
    assert both.wait_s == one.wait_s, "the other takes nobody"
    assert not both.draining
    assert together([two]).draining
    assert together([two, two]).wait_s == two.wait_s


def test_absurd_waits_stay_numbers_that_a_report_may_hold():
    loop = Loop(make(num_pages=13, max_seqs=1))
    loop.scheduler._load.waits.observe(1e300, 1, 1.0)
    for name in "ab":
        submit(loop, name, [1] * 8, 4)
    assert max(loop.scheduler.report(loop.now).wait_s) == MOST
