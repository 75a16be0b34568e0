"""Tests of prompts prepared ahead, on a device that notices every misplaced page."""

from __future__ import annotations

import pytest
from support.branches import LONGER, TEXT, loop_of, serve
from support.device import complete

from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import QueueFull, Rejected


def replace_tail(loop, name, prompt):
    request = loop.scheduler.branches.replace_tail(name, prompt, now=loop.now)
    loop.scheduler.check()
    return request


def test_a_tail_replaced_is_found_by_the_next_request():
    loop = loop_of()
    serve(loop, "p", TEXT, 3)
    before = loop.scheduler.stats()
    prompt = [*TEXT[:10], *[7] * 8]
    request = replace_tail(loop, "p", prompt)
    loop.drain()
    loop.scheduler.check()
    assert (request.finish_reason, request.output, request.cached_tokens) == ("prepared", [], 10)
    assert loop.scheduler.branches.take_prepared() == [request]
    stats = loop.scheduler.stats()
    assert (stats.in_tool_wait, stats.waiting, stats.running) == (1, 0, 0)
    assert stats.computed_tokens - before.computed_tokens == 7  # the last token is always left
    again = serve(loop, "p", [*prompt, 4, 5], 2)
    assert again.cached_tokens == 17


def test_a_wait_goes_on_while_its_tail_is_replaced():
    loop = loop_of(session_ttl_s=60)
    serve(loop, "p", TEXT, 3)
    program = loop.scheduler._programs.find("p")
    began = program.wait_began
    loop.now += 30
    replace_tail(loop, "p", [*TEXT, 9, 9, 9, 9])
    loop.drain()
    assert (program.wait_began, program.turns) == (began, 1)
    loop.now = began + 61
    loop.turn()
    assert loop.scheduler.stats().expired == 1
    loop.scheduler.check()


def test_the_next_request_takes_over_what_is_computed():
    loop = loop_of()
    serve(loop, "p", TEXT, 3)
    prompt = [*TEXT[:8], *[7] * 30]
    request = replace_tail(loop, "p", prompt)
    loop.turn()  # twelve tokens a step
    assert request.slot >= 0
    again = serve(loop, "p", [*prompt, 4], 2)
    assert request.finish_reason == "superseded"
    assert again.cached_tokens == 20
    assert loop.scheduler.branches.take_prepared() == [request]


def test_a_tail_not_begun_costs_its_program_nothing():
    loop = loop_of(max_seqs=1)
    serve(loop, "p", TEXT, 3)
    loop.scheduler.submit([5] * 9, 30, program="busy", now=loop.now)
    loop.turn()
    request = replace_tail(loop, "p", [9] * 20)
    loop.turn()
    again = loop.scheduler.submit([*LONGER, 5], 2, program="p", now=loop.now)
    loop.drain()
    loop.scheduler.check()
    assert (request.finish_reason, again.cached_tokens) == ("superseded", 23)


def test_a_tail_waits_for_everybody_else():
    loop = loop_of(max_seqs=2)
    serve(loop, "p", TEXT, 3)
    request = replace_tail(loop, "p", [9] * 40)
    loop.turn()
    assert request.slot >= 0
    others = [loop.scheduler.submit([5 + i] * 9, 10, now=loop.now) for i in range(3)]
    loop.turn()
    assert [other.slot >= 0 for other in others] == [True, True, False]
    assert request.slot < 0, "it left its slot to them"
    while others[2].finish_reason is None:
        assert request.slot < 0 or others[2].slot >= 0
        loop.turn()
    loop.drain()
    assert request.finish_reason == "prepared"
    assert request.preemptions == loop.scheduler.stats().preemptions == 0
    assert serve(loop, "p", [*[9] * 40, 1], 2).cached_tokens == 39


def test_a_tail_gives_its_pages_to_whoever_runs():
    loop = loop_of(pages=12, max_seqs=3)
    serve(loop, "p", [1] * 4, 2)
    other = loop.scheduler.submit([5] * 9, 35, now=loop.now)  # eleven pages in the end
    loop.turn()
    request = replace_tail(loop, "p", [9] * 28)
    loop.drain()
    loop.scheduler.check()
    assert other.preemptions == 0
    assert request.finish_reason == "prepared"


@pytest.mark.parametrize("prompt", [[3], [1, 1], TEXT[:9], TEXT, LONGER])
def test_tails_that_are_computed_already(prompt):
    loop = loop_of()
    serve(loop, "p", TEXT, 3)
    request = replace_tail(loop, "p", prompt)
    loop.drain()
    loop.scheduler.check()
    assert request.finish_reason == "prepared"
    expected = 0 if prompt == [3] else len(prompt) - 1
    assert serve(loop, "p", [*prompt, 8], 2).cached_tokens in (expected, len(prompt))


def test_a_newer_tail_replaces_an_older_one():
    loop = loop_of()
    serve(loop, "p", TEXT, 3)
    first = replace_tail(loop, "p", [*TEXT[:8], *[7] * 30])
    loop.turn()
    second = replace_tail(loop, "p", [*TEXT[:8], *[7] * 10, 3])
    loop.drain()
    assert (first.finish_reason, second.finish_reason) == ("superseded", "prepared")
    assert second.cached_tokens == 17
    assert loop.scheduler.branches.take_prepared() == [first, second]


@pytest.mark.parametrize("running", [False, True])
def test_a_program_that_ends_ends_its_tail(running):
    loop = loop_of()
    serve(loop, "p", TEXT, 3)
    request = replace_tail(loop, "p", [7] * 40)
    if running:
        loop.turn()
    loop.scheduler.end_program("p", loop.now)
    loop.scheduler.check()
    assert request.finish_reason == "cancelled"
    assert loop.scheduler.stats().programs == 0
    loop.drain()
    assert loop.scheduler.stats().free_pages == 40


def test_a_program_is_forked_while_its_tail_is_computed():
    loop = loop_of()
    serve(loop, "p", TEXT, 3)
    request = replace_tail(loop, "p", [*TEXT[:8], *[7] * 30])
    loop.turn()
    loop.scheduler.branches.fork("p", "child", now=loop.now)
    loop.drain()
    loop.scheduler.check()
    assert serve(loop, "child", [*request.prompt, 2], 2).cached_tokens >= 20
    assert serve(loop, "p", [*request.prompt, 2], 2).cached_tokens >= 36


def test_a_lost_device_fails_a_tail_that_runs():
    loop = loop_of()
    serve(loop, "p", TEXT, 3)
    serve(loop, "q", TEXT, 3)
    running, queued = replace_tail(loop, "p", [7] * 40), replace_tail(loop, "q", [8] * 40)
    loop.turn()
    assert (running.slot >= 0, queued.slot >= 0) == (True, False)
    assert loop.lose_device(transfers_end=True) == [running]
    loop.scheduler.check()
    assert running.finish_reason == "error"
    loop.drain()
    assert queued.finish_reason == "prepared"
    assert serve(loop, "p", [7] * 41, 2).cached_tokens == 0
    assert serve(loop, "q", [8] * 41, 2).cached_tokens == 39


def test_tails_of_nobody_and_of_the_busy_are_refused():
    loop = loop_of(max_context=48)
    with pytest.raises(Rejected, match="has expired"):
        loop.scheduler.branches.replace_tail("p", [1, 2], now=loop.now)
    busy = loop.scheduler.submit(TEXT, 3, program="p", salt=salted("a"), now=loop.now)
    with pytest.raises(QueueFull, match="in progress"):
        loop.scheduler.branches.replace_tail("p", [1, 2], salt=salted("a"), now=loop.now)
    with pytest.raises(Rejected, match="salt"):
        loop.scheduler.branches.replace_tail("p", [1, 2], now=loop.now)
    with pytest.raises(Rejected, match="exceed"):
        loop.scheduler.branches.replace_tail("p", [1] * 48, salt=salted("a"), now=loop.now)
    loop.drain()
    assert busy.output == complete(TEXT, 3)
