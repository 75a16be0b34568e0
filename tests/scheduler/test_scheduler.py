"""The scheduler against a device that notices every misplaced page, one commit late as in the engine."""

from __future__ import annotations

import contextlib
import gc
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.device import complete
from support.loop import Loop, make

from astraea_jax.scheduler.policies import SERVING
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import DEFER_S, Program, QueueFull, Rejected
from astraea_jax.scheduler.strategies import STRATEGIES
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.wait import Wait

HINTS = st.none() | st.sampled_from([0.0, -1.0, 1e300, math.inf, -math.inf, math.nan]) | st.floats(0, 100)
"""Seconds that clients name."""


class Machine(RuleBasedStateMachine):
    """Clients that come, return from tools, cancel and vanish, on a pool too small for them."""

    @initialize(
        policy=st.sampled_from(SERVING),
        strategy=st.sampled_from([None, *STRATEGIES]),
        page_size=st.sampled_from([1, 4]),
        pages=st.integers(14, 40),
        budget=st.sampled_from([4, 12, 64]),
        host=st.sampled_from([HostTier(), HostTier(pages=12, staging=3), HostTier(pages=400, staging=40)]),
        delay=st.integers(0, 5),
    )
    def start(self, policy, strategy, page_size, pages, budget, host, delay):
        pages = pages * 4 // page_size
        sizes = {"page_size": page_size, "num_pages": pages + 1, "max_step_tokens": budget, "session_ttl_s": 60}
        sizes |= {"max_programs": 12, "max_waiting": 5}
        self.scheduler = make(policy, strategy, **sizes, host=host)
        self.loop = Loop(self.scheduler)
        self.loop.delay = delay
        self.live, self.history, self.names = [], {}, 0
        self.programs, self.tails = set(), []

    def submit(self, prompt, max_tokens, stops, name, final, salt, **more):
        try:
            request = self.scheduler.submit(
                prompt,
                max_tokens,
                stops,
                program=name,
                owner=name and name[0],
                final=final,
                salt=salt,
                now=self.loop.now,
                **more,
            )
        except QueueFull:
            stats = self.scheduler.stats()
            assert self.unstarted() == 5 or (stats.programs == 12 and not stats.in_tool_wait + stats.in_human_wait)
            return None
        self.programs.add(request.program)
        assert request.program.leads or request.program.job in [p.job for p in self.programs if p.leads]
        self.live.append(request)
        return request

    @rule(
        prompt=st.lists(st.integers(0, 9), min_size=1, max_size=30),
        system=st.integers(0, 20),
        max_tokens=st.integers(1, 16),
        stops=st.frozensets(st.integers(0, 49), max_size=4),
        owner=st.sampled_from([None, "a", "b", "b", "b"]),
        salt=st.sampled_from([None, salted(""), salted("a")]),
        parent=st.none() | st.tuples(st.sampled_from("ab"), st.integers(1, 9).map("p{}".format)),
        priority=st.integers(-1, 1),
    )
    def arrive(self, prompt, system, max_tokens, stops, owner, salt, parent, priority):
        self.names += 1
        name = (owner, f"p{self.names}") if owner else None
        prompt = [*range(system), *prompt][:32]
        request = self.submit(prompt, max_tokens, stops, name, False, salt, parent=parent, priority=priority)
        if name and request:
            self.history[name] = request

    @precondition(lambda self: self.idle())
    @rule(
        data=st.data(),
        keep=st.integers(0, 40),
        new=st.lists(st.integers(0, 9), min_size=1, max_size=6),
        final=st.booleans(),
    )
    def come_back(self, data, keep, new, final):
        name = data.draw(st.sampled_from(self.idle()))
        before = self.history[name]
        prompt = [*before.prompt, *before.output][: min(keep, 34)] + new
        request = self.submit(prompt, 6, frozenset(), name, final, before.program.salt)
        if request:
            self.history[name] = request

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(sorted(self.history)))
        self.names += 1
        child = (parent[0], f"p{self.names}")
        try:
            self.scheduler.branches.fork(parent, child, self.loop.now)
        except (Rejected, QueueFull):
            stats = self.scheduler.stats()
            assert not self.scheduler.knows(parent) or stats.programs == 12 == stats.running + stats.waiting + 1
            return
        program = self.scheduler._programs.find(child)
        self.programs.add(program)
        self.history[child] = replace(self.history[parent], program=program, finish_reason="fork", final=False)

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), keep=st.integers(0, 40), new=st.lists(st.integers(0, 9), min_size=1, max_size=20))
    def replace_tail(self, data, keep, new):
        name = data.draw(st.sampled_from(self.idle()))
        before = self.history[name]
        prompt = [*before.prompt, *before.output][: min(keep, 20)] + new
        with contextlib.suppress(Rejected, QueueFull):
            tail = self.scheduler.branches.replace_tail(name, prompt, salt=before.program.salt, now=self.loop.now)
            self.tails.append(tail)
            if keep % 2:  # the next request may go on with it
                self.history[name] = replace(tail, finish_reason="prepared")

    def unstarted(self):
        return sum(s.slot < 0 and not s.preemptions for s in self.live if s.finish_reason is None)

    def idle(self):
        return sorted(name for name, s in self.history.items() if s.finish_reason is not None and not s.final)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        request = data.draw(st.sampled_from(self.live))
        self.scheduler.finish(request, "cancelled", self.loop.now)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fail(self, data):
        self.loop.broken.add(data.draw(st.sampled_from(self.live)))

    @precondition(lambda self: self.history)
    @rule(
        data=st.data(),
        tools=st.lists(st.sampled_from(["a", "b", "c"]), max_size=3).map(tuple),
        expected_s=HINTS,
        keep_s=HINTS,
    )
    def wait(self, data, tools, expected_s, keep_s):
        name = data.draw(st.sampled_from(sorted(self.history)))
        self.scheduler.waits(name, Wait(tools, expected_s, keep_s), self.loop.now)

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def end(self, data):
        name = data.draw(st.sampled_from(sorted(self.history)))
        self.scheduler.end_program(name, self.loop.now)
        del self.history[name]

    @rule()
    def pass_time(self):
        self.loop.now += 30

    @rule(count=st.integers(1, 3))
    def break_transfers(self, count):
        self.loop.faults = count

    @rule(launched=st.booleans(), transfers_end=st.booleans())
    def lose_device(self, launched, transfers_end):
        if launched:
            self.loop.launch()
        running = [s for s in self.live + self.tails if s.slot >= 0]
        waiting = [s for s in self.live if s.slot < 0]
        failed = self.loop.lose_device(transfers_end=transfers_end)
        assert sorted(s.number for s in failed) == sorted(s.number for s in running)
        assert {s.finish_reason for s in failed} <= {"error"}
        assert {s.finish_reason for s in waiting} <= {None}
        stats = self.scheduler.stats()
        assert stats.free_pages == self.scheduler.config.num_pages - 1
        assert (stats.running, stats.waiting, stats.cached_pages) == (0, len(waiting), 0)

    @rule(turns=st.integers(1, 6))
    def work(self, turns):
        for _ in range(turns):
            self.loop.turn()

    @invariant()
    def nothing_is_lost(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        for request in self.live:
            reused = request.resumed.device_tokens + request.resumed.host_tokens
            assert reused == request.cached_tokens <= len(request.prompt)
            assert request.output == complete(list(request.prompt), len(request.output))
            if request.finish_reason in ("stop", "length"):
                assert request.output == complete(list(request.prompt), request.max_tokens, request.stops)
        self.live = [s for s in self.live if s.finish_reason is None]
        self.nothing_is_prepared_for_nobody()
        running = sum(s.slot >= 0 for s in self.live)
        stats = self.scheduler.stats()
        assert stats.running == running + sum(s.slot >= 0 for s in self.tails)
        assert (stats.waiting, stats.created) == (len(self.live) - running, len(self.programs))
        assert stats.programs == len(self.live) + stats.in_tool_wait + stats.in_human_wait <= 12
        predict = self.scheduler._policy.predict
        assert all(math.isfinite(predict.wait_s(p, 0.0)) and predict.wait_s(p, 7.0) >= 0 for p in self.programs)
        assert self.unstarted() <= 5

    def nothing_is_prepared_for_nobody(self):
        ended = [tail for tail in self.tails if tail.finish_reason is not None]
        assert set(self.scheduler.branches.take_prepared()) == set(ended)
        assert {tail.finish_reason for tail in ended} <= {"prepared", "superseded", "cancelled", "error"}
        assert not any(tail.output for tail in self.tails)
        self.tails = [tail for tail in self.tails if tail.finish_reason is None]
        assert all(tail.program.preparing is tail for tail in self.tails)
        assert len({tail.program for tail in self.tails}) == len(self.tails)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        self.loop.drain()
        self.nothing_is_lost()
        assert not self.live + self.tails
        for name in list(self.history):
            self.scheduler.end_program(name, self.loop.now)
        self.scheduler.check()
        assert self.scheduler.stats().free_pages == self.scheduler.config.num_pages - 1
        self.loop.drain()
        self.loop.turn()
        assert not self.loop.device.host, "host copies that nobody owns"


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
    assert scheduler.commit(plan, [-1], 0) == [(request, -1)]
    assert request.finish_reason == "error"
    assert scheduler.stats().retained_pages == 0
    scheduler.check()


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
