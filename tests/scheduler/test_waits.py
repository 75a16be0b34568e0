"""Waits and jobs of programs, through the scheduler: where a job begins and ends, and how a wait came out."""

from __future__ import annotations

import math

import pytest
from support.loop import Loop, make

from astraea_jax.scheduler.wait import Wait

SHELL, HUMAN = Wait(("shell",)), Wait()


def turn(loop, key="p", wait=None, count=2, *, pause=0.0, **more):
    """A request of a program, from its submission to its end, and what the program waits for then."""
    program = loop.scheduler._programs.find(key)
    text = [1, 2, 3] if program is None else [*program.last.prompt, *program.last.output, 4]
    request = loop.scheduler.submit(text, count, program=key, now=loop.now, **more)
    loop.drain()
    loop.scheduler.check()
    if wait is not None:
        loop.scheduler.waits(key, wait, loop.now)
    loop.now = request.program.wait_began + pause if pause else loop.now
    return request


def test_a_program_of_which_nobody_says_anything_has_one_job():
    loop = Loop(make(num_pages=40))
    job = turn(loop).program.job
    for _ in range(3):
        assert turn(loop).program.job is job
    assert (job.turns, job.ended, job.arrival) == (4, False, 0.0)


def test_a_job_ends_where_a_human_is_waited_for():
    loop = Loop(make(num_pages=40))
    predict = loop.scheduler._policy.predict
    first = turn(loop, wait=SHELL, pause=5.0).program.job
    answer = turn(loop, wait=HUMAN, pause=300.0)
    assert answer.program.job is first
    assert (first.turns, first.ended) == (2, True)
    assert first.tool_s == pytest.approx(5.0)
    completion = answer.program.wait_began - first.arrival
    assert predict.jobs.sum == pytest.approx(completion)
    assert predict.turns.values == [2]
    again = turn(loop, wait=SHELL)
    assert again.program.job is not first
    assert again.program.job.arrival == again.submitted
    assert (again.program.turns, again.program.job.turns, again.program.job.waited_s) == (3, 1, 1.0)
    assert again.wait.kind == "human"
    assert again.wait.actual_s == pytest.approx(300.0)


def test_what_was_said_last_counts():
    loop = Loop(make(num_pages=40))
    job = turn(loop).program.job
    for _ in range(3):
        loop.scheduler.waits("p", HUMAN, loop.now)
        loop.scheduler.waits("p", SHELL, loop.now)
    loop.scheduler.check()
    assert loop.scheduler.stats().in_human_wait == 0
    assert loop.scheduler.stats().in_tool_wait == 1
    back = turn(loop)
    assert back.program.job is job
    assert back.wait.kind == "tool"
    assert len(loop.scheduler._policy.predict.turns) == 1  # its end has been learned once, wrongly
    loop.scheduler.waits("p", HUMAN, loop.now)
    assert loop.scheduler.stats().in_human_wait == 1
    assert turn(loop).program.job is not job


def test_what_is_said_of_a_program_at_work_or_of_nobody_is_ignored():
    loop = Loop(make(num_pages=40))
    request = loop.scheduler.submit([1, 2, 3], 5, program="p", now=0)
    loop.scheduler.waits("p", HUMAN, 0)
    loop.scheduler.waits("nobody", HUMAN, 0)
    loop.drain()
    assert request.program.wait is None
    assert turn(loop).program.job is request.program.job


def test_children_work_on_the_job_of_their_parent():
    loop = Loop(make(num_pages=60))
    parent = turn(loop, "parent", Wait(("task",))).program
    children = [turn(loop, name, HUMAN, parent="parent").program for name in ("a", "b")]
    assert {child.job for child in children} == {parent.job}
    assert parent.job.turns == 3
    assert not parent.job.ended  # a child's answer is no answer to the human
    assert turn(loop, "a", parent="parent").program.job is parent.job
    first, answer = parent.job, turn(loop, "parent", HUMAN)
    assert first.ended
    assert answer.program.job is first
    assert turn(loop, "b").program.job not in (first, None)  # the parent has none now
    assert children[1].leads
    second = turn(loop, "parent").program.job
    assert turn(loop, "a").program.job is second  # and now it has another


def test_children_outlive_their_parent():
    loop = Loop(make(num_pages=60))
    parent = turn(loop, "parent").program
    child = turn(loop, "child", Wait(("x",)), parent="parent").program
    assert child.job is parent.job
    loop.scheduler.end_program("parent", loop.now)
    assert turn(loop, "child").program.job is not parent.job
    assert child.leads
    loop.scheduler.end_program("child", loop.now)
    loop.scheduler.check()
    assert loop.scheduler.stats().programs == 0


@pytest.mark.parametrize("parent", ["p", "nobody", "other's"])
def test_a_parent_that_is_none(parent):
    loop = Loop(make(num_pages=60))
    turn(loop, "other's", owner="other")
    program = turn(loop, "p", owner="me", parent=parent).program
    assert program.leads
    assert turn(loop, "p", owner="me", parent=parent).program.job is program.job
    assert program.job is not loop.scheduler._programs.find("other's").job


def test_a_job_keeps_its_leader_among_programs_that_are_each_others_parents():
    loop = Loop(make(num_pages=60))
    first = turn(loop, "a", Wait(("x",)), parent="b").program
    loop.scheduler.branches.fork("a", "b", loop.now)  # whose parent is a, whose parent is b
    back = turn(loop, "a", Wait(("x",))).program
    assert back is first
    assert back.leads
    child = turn(loop, "b").program
    assert child.job is first.job
    assert not child.leads
    loop.scheduler.end_program("a", loop.now)
    assert first.job.ended


def test_a_leader_that_joins_another_job_ends_its_own():
    loop = Loop(make(num_pages=60))
    a = turn(loop, "a", Wait(("x",))).program
    child, own = turn(loop, "child", Wait(("x",)), parent="a").program, a.job
    other = turn(loop, "other", Wait(("x",))).program
    learned = len(loop.scheduler._policy.predict.turns)
    assert turn(loop, "a", Wait(("x",)), parent="other").program.job is other.job
    assert own.ended
    assert len(loop.scheduler._policy.predict.turns) == learned + 1
    grandchild = turn(loop, "grandchild", parent="child").program
    assert child.job is own  # until its next request
    assert grandchild.leads  # nobody is left who could end that job
    assert turn(loop, "child").program.job is other.job


def test_children_of_children_of_an_earlier_job():
    loop = Loop(make(num_pages=60))
    turn(loop, "parent", Wait(("x",)))
    child = turn(loop, "child", Wait(("x",)), parent="parent").program
    turn(loop, "parent", HUMAN)
    first, second = child.job, turn(loop, "parent").program.job
    assert first is not second
    assert turn(loop, "grandchild", parent="child").program.leads  # until its parent takes part in the second
    assert turn(loop, "child").program.job is turn(loop, "grandchild").program.job is second


@pytest.mark.parametrize("absurd", [math.nan, math.inf, -math.inf, -1.0, 1e300])
def test_absurd_hints_change_nothing_but_their_outcome(absurd):
    def served(**hints):
        loop = Loop(make("astraea", "adaptive", num_pages=20))
        outputs = [turn(loop, wait=Wait(("shell",), **hints)).output]
        outputs += [turn(loop, key, SHELL).output for key in "qrst"]
        back = turn(loop)
        return [*outputs, back.output], back.wait

    plain, hinted = served(), served(expected_s=absurd, keep_s=absurd)
    assert hinted[0] == plain[0]
    assert plain[1].hinted is None
    assert hinted[1].hinted == ("clipped" if absurd > 0 else "ignored")
    assert hinted[1].leased in ("ignored", hinted[1].hinted)
    assert math.isfinite(hinted[1].predicted_s)
    assert hinted[1].actual_s >= 0


def test_a_wait_says_how_it_came_out():
    loop = Loop(make(num_pages=40))
    first = turn(loop, wait=Wait(("shell",), expected_s=7.0), pause=9.0)
    assert first.wait is None
    told = turn(loop, wait=None, pause=2.0).wait
    assert (told.kind, told.predicted_s, told.hinted, told.leased) == ("tool", 7.0, "accepted", None)
    assert told.actual_s == pytest.approx(9.0)
    silent = turn(loop).wait
    assert (silent.kind, silent.hinted) == (None, None)
    assert silent.actual_s == pytest.approx(2.0)


@pytest.mark.parametrize(("wait", "completed"), [(None, True), (HUMAN, True), (SHELL, False)])
def test_a_session_that_is_ended_has_completed_its_job_unless_its_tools_still_ran(wait, completed):
    loop = Loop(make(num_pages=40))
    program = turn(loop, wait=wait).program
    loop.scheduler.end_program("p", loop.now)
    predict = loop.scheduler._policy.predict
    assert sum(predict.jobs.counts) == completed
    assert predict.turns.values == [1]
    assert program.job.ended
