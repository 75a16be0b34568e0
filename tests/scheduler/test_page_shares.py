"""Whose KV goes first where several tenants have some: what the rule says, and what it does in a scheduler."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loop import Loop, make, serve

from astraea_jax.scheduler.evictor import Evictor
from astraea_jax.scheduler.page_shares import ALL, MOST_TENANTS, ON_DEVICE, ON_HOST, RECENT_S, PageShares
from astraea_jax.scheduler.policies import SERVING
from astraea_jax.scheduler.prefix import salted
from astraea_jax.scheduler.transfer import HostTier
from astraea_jax.scheduler.wait import Wait

SHELL, HUMAN, KEPT = Wait(("shell",)), Wait(), Wait(("shell",), keep_s=100.0)
SALT = salted("")


def tenants(held, size=100, weights=None, now=0.0):
    """Shares of a device of so many pages, of which each owner holds some."""
    shares = PageShares((size, size), weights)
    numbers = {owner: shares.enter(owner, now) for owner in held}
    for owner, pages in held.items():
        shares.hold(ON_DEVICE, numbers[owner], pages)
    return shares, numbers


@pytest.mark.parametrize(
    ("held", "weights", "to", "needs", "spare", "expected"),
    [
        ({"a": 100}, {}, "a", 9, True, [("a", ALL)]),
        ({"a": 70, "b": 30}, {}, "b", 10, True, [("a", 20), ("b", ALL)]),
        ({"a": 70, "b": 30}, {}, "a", 10, True, [("a", 30)]),  # what it needs counts as its own
        ({"a": 70, "b": 30}, {}, "a", 10, False, [("a", 30), ("b", ALL)]),
        ({"a": 40, "b": 50}, {}, "a", 20, True, [("a", 10)]),
        ({"a": 60, "b": 30, "c": 10}, {}, "c", 10, True, [("a", 27), ("b", ALL), ("c", ALL)]),
        ({"a": 60, "b": 40}, {"a": 3.0}, "a", 10, True, [("b", 15), ("a", ALL)]),
        ({"a": 10, "b": 90}, {"a": 0.0}, "b", 10, True, [("a", 10), ("b", ALL)]),
        ({"a": 10, "b": 90}, {"a": 0.0}, "a", 10, True, [("a", 20)]),
        ({"a": 10, "b": 90}, {"a": 0.0, "b": 0.0}, "a", 10, True, [("a", 20), ("b", 90)]),
    ],
)
def test_who_gives_and_how_much(held, weights, to, needs, spare, expected):
    shares, numbers = tenants(held, weights=weights)
    found = shares.givers(ON_DEVICE, numbers.values(), 0.0, needs=needs, to=numbers[to], spare=spare)
    names = {number: owner for owner, number in numbers.items()}
    assert [(names[number], most) for number, most in found] == expected


def test_who_has_long_had_no_request_has_no_share():
    shares, numbers = tenants({"old": 10, "older": 20, "busy": 60, "new": 10})
    shares.asks(numbers["busy"])
    shares.asks(numbers["old"])
    shares.asks_no_more(numbers["old"], 1.0)
    now = 2.0 + RECENT_S
    shares.enter("new", now)
    found = shares.givers(ON_DEVICE, numbers.values(), now, needs=10, to=numbers["new"], spare=True)
    expected = [("older", 20), ("old", 10), ("busy", 10), ("new", ALL)]
    assert found == [(numbers[owner], most) for owner, most in expected]


def test_all_are_one_where_they_are_not_apart():
    shares = PageShares((100, 0), {"a": 5.0}, apart=False)
    assert shares.enter("a", 0.0) == shares.enter("b", 0.0)
    assert not shares.several


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from(["opens", "ends", "holds", "lets go", "asks"])),
        max_size=80,
    )
)
def test_no_tenant_is_remembered_that_has_nothing(events):
    shares = PageShares((100, 100))
    programs, held = Counter(), (Counter(), Counter())
    numbers = {}
    for at, (owner, event) in enumerate(events):
        tier = held[at % 2]
        if event == "opens":
            numbers[owner] = shares.enter(owner, at)
            programs[owner] += 1
        elif event == "ends" and programs[owner]:
            programs[owner] -= 1
            shares.leave(numbers[owner])
        elif event == "holds" and programs[owner]:
            tier[owner] += 3
            shares.hold(at % 2, numbers[owner], 3)
        elif event == "lets go" and tier[owner]:
            tier[owner] -= 1
            shares.hold(at % 2, numbers[owner], -1)
        opened = (numbers[owner] for owner in programs.elements())
        shares.check(opened, (), tuple(Counter({numbers[o]: n for o, n in t.items() if n}) for t in held))
        there = {owner for owner in numbers if programs[owner] or held[0][owner] or held[1][owner]}
        assert shares.several == (len(there) > 1)
        assert sum(most for _, most in shares.givers(ON_HOST, [numbers[o] for o in there], at)) >= 0


def test_of_very_many_tenants_the_last_are_one():
    """Else whoever comes under ever new names makes all evictions slower; who has a weight is told apart."""
    shares = PageShares((10**6, 0), {"paid": 2.0})
    numbers = [shares.enter(f"salt:{i}", 0.0) for i in range(3 * MOST_TENANTS)]
    known = shares.enter("salt:7", 0.0), shares.enter("paid", 0.0)
    assert len({*numbers, *known}) == MOST_TENANTS + 2
    assert known[0] == numbers[7]
    assert known[1] not in numbers
    for number in (*numbers, *known):
        shares.leave(number)
    shares.check((), (), (Counter(), Counter()))
    assert not shares.several


# -- in a scheduler ------------------------------------------------------------------------------------------------


def session(loop, owner, number, size=13, wait=SHELL, **more):
    """A session that has had a request, and waits."""
    request = serve(loop, (owner, number), [number] * size, owner=owner, **more)
    loop.scheduler.waits((owner, number), wait, loop.now)
    return request


def back(loop, first):
    """Where a session finds the KV of its first request when it goes on."""
    key = first.program.key
    return serve(loop, key, [*first.prompt, *first.output], owner=first.program.owner).resumed


def flood(loop, how, count=30, size=13, salt=None):
    """Somebody sends more than fits, in sessions, or in requests that stand alone."""
    for number in range(count):
        if how == "sessions":
            session(loop, "flood", number, size, KEPT)
        else:
            loop.scheduler.submit([number] * 25, 3, owner="flood", salt=salt, now=loop.now)
    loop.drain()
    loop.scheduler.check()


@pytest.mark.parametrize("how", ["sessions", "requests"])
@pytest.mark.parametrize("wait", [SHELL, HUMAN])
@pytest.mark.parametrize("strategy", ["adaptive", "always-keep", "infercept", "cachettl", "mori"])
def test_a_flood_takes_no_kv_of_a_tenant_within_its_share(how, wait, strategy):
    loop = Loop(make("fcfs", strategy, num_pages=33, max_waiting=100, max_step_tokens=100))
    first = session(loop, "small", 99, 21, wait)
    flood(loop, how)
    assert back(loop, first).source == "device"


@pytest.mark.parametrize("how", ["sessions", "requests"])
def test_as_one_tenant_it_would(how):
    loop = Loop(make("fcfs", num_pages=33, max_waiting=100, max_step_tokens=100))
    first = session(loop, "flood", 99, 21)
    flood(loop, how)
    assert back(loop, first).source == "recomputed"


@pytest.mark.parametrize("how", ["sessions", "requests"])
def test_a_flood_takes_no_cached_pages_of_a_tenant_within_its_share(how):
    loop = Loop(make("fcfs", num_pages=33, max_waiting=100, max_step_tokens=100))
    serve(loop, None, [99] * 13, owner="small", salt=SALT)
    kept = session(loop, "small", 1, 21)  # its tenant is there
    flood(loop, how, salt=salted("flood"))
    assert serve(loop, None, [99] * 13, owner="small", salt=SALT).cached_tokens == 12
    assert back(loop, kept).source == "device"


@pytest.mark.parametrize("how", ["sessions", "requests"])
def test_a_flood_takes_no_host_copies_of_a_tenant_within_its_share(how):
    host = HostTier(pages=24, staging=12)
    loop = Loop(make("program-fcfs", "always-offload", num_pages=33, max_waiting=100, host=host, max_step_tokens=100))
    first = [session(loop, "small", number) for number in (97, 98, 99)]
    flood(loop, how)
    assert {back(loop, one).source for one in first} == {"host"}


def test_growing_rows_of_a_flood_make_room_for_each_other():
    """They need three times the pool in the end."""
    loop = Loop(make("fcfs", num_pages=33, max_seqs=6))
    first = [session(loop, "small", number, size=13) for number in (97, 98, 99)]
    for number in range(6):
        loop.scheduler.submit([number] * 4, 40, owner="flood", now=loop.now)
    loop.drain()
    assert loop.scheduler.stats().preemptions
    assert {back(loop, one).source for one in first} == {"device"}


def test_beyond_its_share_a_tenant_loses_what_others_need():
    loop = Loop(make("fcfs", num_pages=33))
    large = [session(loop, "large", number) for number in range(6)]  # 24 of 32 pages
    small = [session(loop, "small", number) for number in range(10, 14)]
    assert [back(loop, one).source for one in large[:2]] == ["recomputed"] * 2
    assert {back(loop, one).source for one in small} == {"device"}


def test_a_tenant_that_has_long_gone_makes_room_for_all():
    loop = Loop(make("fcfs", num_pages=33))
    old = session(loop, "old", 1)
    busy = [session(loop, "busy", number) for number in range(7)]
    loop.now += RECENT_S + 1.0
    busy = [serve(loop, one.program.key, [*one.prompt, *one.output, 7], owner="busy") for one in busy]
    serve(loop, None, [9] * 13, owner="other")
    assert {back(loop, one).source for one in busy} == {"device"}
    assert back(loop, old).source == "recomputed"


@pytest.mark.parametrize("policy", SERVING)
@pytest.mark.parametrize("owner", ["new", "small"])
def test_a_request_beyond_its_tenant_s_share_runs_all_the_same(policy, owner):
    loop = Loop(make(policy, num_pages=17))
    for number, name in enumerate(["small", "b", "c", "d"]):
        session(loop, name, number)
    large = serve(loop, None, [9] * 44, 4, owner=owner)
    assert large.finish_reason == "length"


def test_a_request_beyond_its_tenant_s_share_runs_beside_others():
    """Somebody always runs, so nothing is ever at rest."""
    loop = Loop(make("fcfs", num_pages=17, max_seqs=3))
    for number, name in enumerate("bcd"):
        session(loop, name, number)
    loop.scheduler.submit([5], 40, owner="e", now=loop.now)
    loop.turn()
    large = loop.scheduler.submit([9] * 20, 4, owner="large", now=loop.now)
    for _ in range(20):
        loop.turn()
    assert large.finish_reason == "length"


def test_pages_that_tenants_share_count_once():
    """Without keys, tenants of no salt find each other's pages."""
    loop = Loop(make("fcfs", num_pages=33))
    serve(loop, ("a", 1), [1] * 13, owner="a", salt=SALT)
    other = serve(loop, ("b", 1), [1] * 13, owner="b", salt=SALT)
    assert other.cached_tokens == 12
    held = loop.scheduler._pool.held()
    numbers = [loop.scheduler._programs.find((name, 1)).tenant for name in "ab"]
    assert [held[number] for number in numbers] == [4, 1]
    loop.scheduler.end_program(("a", 1), loop.now)
    loop.scheduler.end_program(("b", 1), loop.now)
    assert loop.scheduler._pool.held()[numbers[1]] == 3  # who used them last
    third = serve(loop, ("c", 1), [1] * 13, owner="c", salt=SALT)
    assert loop.scheduler._pool.held()[third.program.tenant] == 4


def test_tenants_that_come_and_go_leave_nothing():
    loop = Loop(make("fcfs", num_pages=33, max_programs=8))
    for number in range(60):
        session(loop, f"tenant-{number}", number, salt=salted(str(number)))
    shares = loop.scheduler._shares
    assert len(shares._number) <= 8 + 32  # programs, and pages
    assert len(shares._weight) <= 2 * (8 + 32) + 8


# -- what holds whatever happens -----------------------------------------------------------------------------------


class Watched:
    """Looks at every eviction: what each tenant had before, and who could still have given afterwards."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        evictor: Evictor = scheduler._residency.evictor
        self._evict, evictor.evict = evictor.evict, self.evict

    def idle(self, keep=None):
        """Pages that each tenant could give, which no program uses that is kept or runs."""
        pool = self.scheduler._pool
        idle = Counter({tenant: len(pages) for tenant, pages in pool._cached.items()})
        for program in self.scheduler._programs.programs():
            if program is not keep:
                idle[program.tenant] += sum(not pool.shared(page) for page in program.pages)
        return +idle

    def evict(self, need, now):
        before, held = self.idle(need.keep), self.held(need)
        enough = self._evict(need, now)
        if self.scheduler._shares.several:
            after, held_now = self.idle(need.keep), self.held(need)
            share = self.scheduler._shares._share(now) * self.scheduler._pool.size
            beyond = [tenant for tenant in after if held_now[tenant] > math.ceil(share[tenant])]
            lost = {tenant: pages - after[tenant] for tenant, pages in before.items() if after[tenant] < pages}
            within = [tenant for tenant, pages in lost.items() if held[tenant] - pages < math.floor(share[tenant])]
            assert not (within and beyond), "a tenant within its share loses KV while another above its share has some"
        return enough

    def held(self, need):
        """Pages that each tenant holds, who needs some as if it had them."""
        held = self.scheduler._pool.held()
        held[need.tenant] += need.pages
        return held


@settings(max_examples=60, deadline=None)
@given(
    weights=st.sampled_from([{}, {"a": 0.0}, {"b": 4.0}]),
    policy=st.sampled_from(["fcfs", "astraea", "program-fcfs"]),
    pages=st.integers(14, 40),
    events=st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.sampled_from("abc"), st.integers(0, 4), st.integers(1, 40), st.booleans()),
            st.tuples(st.just("turns"), st.integers(1, 12)),
            st.tuples(st.just("end"), st.sampled_from("abc"), st.integers(0, 4)),
            st.tuples(st.just("pass"), st.sampled_from([1.0, RECENT_S])),
        ),
        min_size=20,
        max_size=40,
    ),
)
def test_a_tenant_within_its_share_loses_nothing_while_another_above_has_idle_pages(weights, policy, pages, events):
    sizes = {"num_pages": pages, "tenant_weights": weights, "max_waiting": 100, "session_ttl_s": math.inf}
    loop, sessions = Loop(make(policy, **sizes)), {}
    Watched(loop.scheduler)
    for event, *of in events:
        if event == "submit":
            owner, number, size, salty = of
            before = sessions.get((owner, number))
            if before is not None and before.finish_reason is None:
                continue
            text = [] if before is None else [*before.prompt, *before.output]
            prompt, key = [*text, *[10 + number] * size][-40:], (owner, number)
            program = loop.scheduler._programs.find(key)
            salt = program.salt if program else salted(owner) if salty else None
            sessions[key] = loop.scheduler.submit(prompt, 4, program=key, owner=owner, salt=salt, now=loop.now)
        elif event == "turns":
            for _ in range(of[0]):
                loop.turn()
        elif event == "end":
            loop.scheduler.end_program(tuple(of), loop.now)
        else:
            loop.now += of[0]
        loop.scheduler.check()
    loop.drain()
    loop.scheduler.check()
    for key in sessions:
        loop.scheduler.end_program(key, loop.now)
    loop.scheduler.check()
    assert loop.scheduler._shares.several <= bool(loop.scheduler.stats().cached_pages)
