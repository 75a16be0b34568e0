"""Everything that clients and the device can do to a scheduler, in any order, as a state machine.

The device (support/device.py) notices every misplaced page, and steps are committed one late, as in the engine.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.device import complete
from support.kv_listener import Listener, Truth
from support.loop import Loop, make

from astraea_jax.scheduler.placement import Report
from astraea_jax.scheduler.policies import SERVING
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.program import QueueFull, Rejected
from astraea_jax.scheduler.strategies import STRATEGIES
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.wait import Wait
from astraea_jax.scheduler.windows import Window

HINTS = st.none() | st.sampled_from([0.0, -1.0, 1e300, math.inf, -math.inf, math.nan]) | st.floats(0, 100)
"""Seconds that clients name."""
PARENTS = st.none() | st.tuples(st.sampled_from("ab"), st.integers(1, 9).map("p{}".format))
"""Keys that clients name, of programs that are there, that will be, or that nobody opens."""


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
        window=st.none() | st.sampled_from([1, 3, 4, 5, 13]),
        spare=st.integers(0, 12),
        windows=st.integers(1, 4),
        weights=st.sampled_from([{}, {"a": 0.0}, {"b": 4.0, None: 0.5}]),
        credit_s=st.sampled_from([0.0, 0.02, 5.0]),
    )
    def start(self, policy, strategy, page_size, pages, budget, host, delay, window, spare, windows, weights, credit_s):
        pages = pages * 4 // page_size
        if window:
            least = Window(window, 0).span(page_size) + 2
            window = Window(window, 1 + windows * least + -(-budget // page_size) + spare)
            host = replace(host, layers=(1, 2))
        sizes = {"page_size": page_size, "num_pages": pages + 1, "max_step_tokens": budget, "session_ttl_s": 60}
        sizes |= {"max_programs": 12, "max_waiting": 5, "kv_events": True, "tenant_weights": weights}
        self.scheduler = make(policy, strategy, **sizes, host=host, window=window)
        self.scheduler._planner.tenants.credit_s = credit_s
        self.listener, self.truth = Listener(), Truth(self.scheduler)
        self.loop = Loop(self.scheduler)
        self.loop.delay = delay
        self.live, self.history, self.names = [], {}, 0
        self.programs, self.tails, self.gone = set(), [], {}
        self.early = set()
        """Forks of programs that ran: nobody knows yet what all of their tokens are."""

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
        assert not request.program.job.left
        self.live.append(request)
        return request

    @rule(
        prompt=st.lists(st.integers(0, 9), min_size=1, max_size=30),
        system=st.integers(0, 20),
        max_tokens=st.integers(1, 16),
        stops=st.frozensets(st.integers(0, 49), max_size=4),
        owner=st.sampled_from([None, "a", "b", "b", "b"]),
        salt=st.sampled_from([None, salted(""), salted("a")]),
        parent=PARENTS,
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
        parent=PARENTS,
    )
    def come_back(self, data, keep, new, final, parent):
        name = data.draw(st.sampled_from(self.idle()))
        before = self.history[name]
        prompt = [*before.prompt, *before.output][: min(keep, 34)] + new
        request = self.submit(prompt, 6, frozenset(), name, final, before.program.salt, parent=parent)
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
        if program.last.finish_reason is None:
            self.early.add(program)
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
                before = tail
            self.history[name] = replace(before, finish_reason="prepared")

    @rule(limit=st.integers(0, 3))
    def hand_over(self, limit):
        before, waiting = self.scheduler.stats(), len(self.scheduler._programs.idle)
        for handed in self.scheduler.branches.hand_over(limit):
            assert not self.scheduler.knows(handed.key)
            last = self.history[handed.key]
            if last.finish_reason in ("stop", "length"):
                assert handed.tokens == (*last.prompt, *last.output)
            self.gone[handed.key] = handed
        after = self.scheduler.stats()
        assert after.moved - before.moved == waiting - len(self.scheduler._programs.idle) <= limit

    @precondition(lambda self: self.gone)
    @rule(data=st.data(), again=st.booleans())
    def take_over(self, data, again):
        key = data.draw(st.sampled_from(sorted(self.gone)))
        handed = self.gone[key] if again else self.gone.pop(key)
        known = self.scheduler.knows(key)
        try:
            request = self.scheduler.branches.take_over(handed, self.loop.now)
        except Rejected:
            assert known or len(handed.tokens) + 1 > self.scheduler.config.max_context
            return
        except QueueFull:
            return
        assert not known
        self.programs.add(request.program)
        self.tails.append(request)
        self.history[key] = replace(request, finish_reason="prepared")

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
        self.what_is_cached_is_told()
        running = sum(s.slot >= 0 for s in self.live)
        stats = self.scheduler.stats()
        assert stats.running == running + sum(s.slot >= 0 for s in self.tails)
        assert (stats.waiting, stats.created) == (len(self.live) - running, len(self.programs))
        assert stats.programs == len(self.live) + stats.in_tool_wait + stats.in_human_wait <= 12
        predict = self.scheduler._policy.predict
        assert all(math.isfinite(predict.wait_s(p, 0.0)) and predict.wait_s(p, 7.0) >= 0 for p in self.programs)
        assert self.unstarted() <= 5
        self.what_it_says_of_itself_is_true()

    def what_it_says_of_itself_is_true(self):
        report, size = self.scheduler.report(self.loop.now), self.scheduler.config.page_size
        stats, programs = self.scheduler.stats(), self.scheduler._programs.programs()
        assert Report.from_fields(report.fields()) == report
        assert (report.free, report.retained) == (stats.free_pages * size, stats.retained_pages * size)
        assert 0 <= report.demand <= report.live + 1e-3
        lasts = [program.last for program in programs if program.last is not None]
        unused = any(last.prepares for last in lasts) or any(p.last.program is not p for p in self.early & {*programs})
        if not unused:  # what is prepared, or forked early, counts once it is used
            assert report.live == self.distinct(programs, size)

    def distinct(self, programs, size):
        """Count the tokens of all contexts; full pages whose programs share KV, and that are the same, count once."""
        full, own = set(), 0
        for program in programs:
            request, last = self.scheduler._programs.live.get(program), program.last
            if request is not None:
                tokens, count = request.prompt, len(request.prompt)
                own += len(request.output)
            elif last is None:
                continue
            else:
                tokens = [*last.prompt, *last.output]
                count = len(tokens) if last.program is program else program.computed + 1
            pages = (count - 1) // size if program.salt is not None else 0
            full |= {(program.salt, *tokens[: (i + 1) * size]) for i in range(pages)}
            own += count - pages * size
        return len(full) * size + own

    def what_is_cached_is_told(self):
        self.listener.hear(self.scheduler.kv_log.take())
        assert self.listener.tiers == self.truth.tiers()

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
