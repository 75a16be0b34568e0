"""The router as a state machine: what it counts, where programs are, and that they are on one replica at a time."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from support.reports import QUIET

from astraea_jax.scheduler.placement import place
from astraea_jax.scheduler.prefix import beginnings
from astraea_jax.scheduler.rival_placements import RULES, make_rule
from astraea_jax.scheduler.router import NoReplica, Router

PROGRAMS = st.integers(0, 7)
REPLICAS = st.sampled_from("abcd")


class Routing(RuleBasedStateMachine):
    """Random events; ``sent`` is what a caller knows to be in flight."""

    routes = Bundle("routes")

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.router = Router(self.rule_of(), max_programs=5)
        self.sent = {}
        self.there, self.draining = set(), set()

    def rule_of(self):
        return place

    @rule(replica=REPLICAS)
    def join(self, replica):
        self.router.join(replica, self.now)
        self.there.add(replica)

    @rule(replica=REPLICAS)
    def leave(self, replica):
        self.router.leave(replica, self.now)
        self.there.discard(replica)
        self.draining.discard(replica)
        self.sent = {n: entry for n, entry in self.sent.items() if entry[0].replica != replica}

    @rule(replica=REPLICAS)
    def drain(self, replica):
        self.router.drain(replica)
        if replica in self.there:
            self.draining.add(replica)

    @rule(replica=REPLICAS, later=st.floats(0, 20))
    def report(self, replica, later):
        self.now += later
        self.router.report(replica, QUIET, self.now)

    @rule(
        target=routes,
        program=st.none() | PROGRAMS,
        tokens=st.integers(1, 10_000),
        parent=st.none() | PROGRAMS,
        avoid=st.frozensets(REPLICAS, max_size=2),
        text=st.lists(st.integers(0, 1), max_size=12),
    )
    def route(self, program, tokens, parent, avoid, text):
        home = self.router.home(program) if program is not None else None
        running = program is not None and any(p == program for _, p, _ in self.sent.values())
        prefixes = [(tuple(text[:length]), 100 * length) for length in range(1, len(text) + 1)]
        try:
            route = self.router.route(program, tokens, self.now, parent=parent, avoid=avoid, prefixes=prefixes)
        except NoReplica:
            assert not self.there - self.draining - avoid
            assert home is None or home in avoid
            return None
        assert route.replica in self.there - avoid
        if home is not None and home not in avoid and (running or home in self.draining):
            assert route.replica == home
        elif home is None:
            assert route.replica not in self.draining
        assert route.moved == (home is not None and route.replica != home)
        if program is not None:
            assert self.router.home(program) == route.replica
        self.sent[route.number] = route, program, tokens
        return route

    @rule(route=routes)
    def prefilled(self, route):
        if route is not None:
            self.router.prefilled(route)

    @rule(route=consumes(routes), context=st.integers(0, 20_000), twice=st.booleans(), last=st.booleans())
    def ended(self, route, context, twice, last):
        for _ in range(1 + twice):
            if route is not None:
                self.router.ended(route, self.now, context=context, last=last)
                self.sent.pop(route.number, None)

    @rule(program=PROGRAMS, replica=REPLICAS, ago=st.sampled_from([0.0, 1.0, 10.0]))
    def gone(self, program, replica, ago):
        home, busy = self.router.home(program), self.router.busy(program)
        self.router.gone(program, replica, self.now - ago)
        if home != replica or busy:
            assert self.router.home(program) == home

    @rule(ago=st.sampled_from([0.0, 1.0, 10.0]))
    def expire(self, ago):
        busy = {p for p in range(8) if self.router.busy(p)}
        self.router.expire(self.now - ago)
        assert all(self.router.busy(p) for p in busy)

    @rule(program=PROGRAMS)
    def forget(self, program):
        self.router.forget(program)
        assert self.router.home(program) is None

    @rule(program=PROGRAMS, replica=REPLICAS)
    def settle(self, program, replica):
        before = self.router.home(program)
        self.router.settle(program, replica, self.now)
        assert self.router.home(program) == (replica if replica in self.there else before)

    @invariant()
    def counts_add_up(self):
        fleet, names = self.router.fleet, self.router.replicas
        assert len(self.router) <= 5
        assert set(names) == self.there
        requests = Counter(route.replica for route, _, _ in self.sent.values())
        contexts = Counter()
        for route, _, tokens in self.sent.values():
            contexts[route.replica] += tokens
        for name in names:
            index = self.router.index(name)
            assert fleet.requests[index] == requests[name]
            assert fleet.context[index] == contexts[name]
            assert fleet.fresh[index] >= 0
            assert fleet.homes[index] >= 0
            assert fleet.takes[index] == (name not in self.draining)
        assert fleet.requests.sum() == len(self.sent)


class RoutingByHash(Routing):
    def rule_of(self):
        return make_rule("consistent-hash")


class RoutingByBusiness(Routing):
    def rule_of(self):
        return make_rule("least-busy")


TestRouting = Routing.TestCase
TestRoutingByHash = RoutingByHash.TestCase
TestRoutingByBusiness = RoutingByBusiness.TestCase
for case in (TestRouting, TestRoutingByHash, TestRoutingByBusiness):
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def router_of(count, **options):
    router = Router(max_programs=100, **options)
    for i in range(count):
        router.join(i, 0.0)
        router.report(i, QUIET, 0.0)
    return router


def test_nobody_herds_between_reports():
    router = router_of(4)
    sent = Counter(router.route(i, 1000, 0.0).replica for i in range(40))
    assert set(sent.values()) == {10}


def test_children_go_where_their_parents_prefix_is():
    router = router_of(4)
    for i in range(8):
        route = router.route(i, 20_000, 0.0)
        router.ended(route, 1.0, context=20_000)
    for i in range(8):
        child = router.route(("child", i), 20_100, 2.0, parent=i)
        assert child.replica == router.home(i)
        router.ended(child, 3.0, context=20_200)


def test_programs_of_one_beginning_go_where_it_is():
    router = router_of(4)
    first = router.route("a", 30_000, 0.0, prefixes=[("system prompt", 25_000)])
    router.ended(first, 1.0, context=30_000)
    second = router.route("b", 30_000, 2.0, prefixes=[("system prompt", 25_000)])
    assert second.replica == first.replica


class Seen:
    """A rule that takes the first replica, and keeps what it was asked about."""

    def __init__(self):
        self.segments = []

    def __call__(self, segment, fleet, allowed):
        self.segments.append(segment)
        return int(np.flatnonzero(allowed)[0])


TOOLS, TASK = range(12_000), range(50_000, 53_000)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([*TOOLS, *TASK, *range(25_000)], 40_000),  # a fork: all that its parent has
        ([*TOOLS, *TASK], 40_000),  # of its beginning
        ([*TOOLS, *range(60_000, 61_000)], 44 * 256),  # another task: eight ninths of what they have in common, or more
        (range(70_000, 90_000), 0),
        (range(70_000, 70_100), 0),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_what_is_taken_to_be_where_the_parent_is(prompt, expected, named):
    seen = Seen()
    router = router_of(2, rule=seen)
    first = router.route("parent", 15_000, 0.0, prefixes=beginnings([*TOOLS, *TASK]))
    router.ended(first, 0.5, context=40_000)
    parent = "parent" if named else None
    router.route("child", len(prompt), 1.0, parent=parent, prefixes=beginnings(tuple(prompt)))
    if not named:
        expected = min(expected, 14_848)  # of a first prompt whole 256 tokens
    assert max(seen.segments[-1].shared.values(), default=0) == min(expected, len(prompt))


def test_a_parent_of_whom_no_prompt_is_known_has_all():
    seen = Seen()
    router = router_of(2, rule=seen)
    router.ended(router.route("parent", 15_000, 0.0), 0.5, context=40_000)
    router.route("child", 30_000, 1.0, parent="parent")
    assert seen.segments[-1].shared == {0: 30_000}


def test_beginnings_are_forgotten_when_nobody_uses_them():
    seen = Seen()
    router = router_of(1, rule=seen, max_prefixes=2)
    for number, name in enumerate("abcca"):
        router.route(number, 1_000, 0.0, prefixes=[(name, 512)])
    assert [segment.shared for segment in seen.segments[3:]] == [{0: 512}, {}]


def test_a_prefix_that_is_there_is_not_prefilled():
    router = router_of(1)
    for program in "ab":
        router.route(program, 1_000, 0.0, prefixes=[("tools", 768)])
    assert router.fleet.fresh.tolist() == [1_000 + 232]


def test_programs_of_a_replica_that_died_are_placed_anew():
    router = router_of(2)
    route = router.route("p", 5_000, 0.0)
    router.ended(route, 1.0, context=6_000)
    router.leave(route.replica, 2.0)
    again = router.route("p", 6_100, 3.0)
    assert again.replica != route.replica
    assert not again.moved
    router.leave(again.replica, 4.0)
    with pytest.raises(NoReplica, match="0 replicas"):
        router.route("p", 6_100, 5.0)


def test_a_session_that_two_replicas_claim_is_where_it_was_said_last():
    router = router_of(2)
    router.settle("p", 0, 0.0)
    router.settle("p", 1, 0.0)
    assert router.home("p") == 1
    assert router.route("p", 10, 0.0).replica == 1


def test_who_has_been_idle_longest_is_forgotten_first():
    """Idle since its request has ended, however long ago that came; and whoever has one in flight is not."""
    router = Router(max_programs=3)
    router.join("r", 0.0)
    long, short, busy = (router.route(name, 100, 0.0) for name in ("long", "short", "busy"))
    router.ended(short, 1.0, context=200)
    router.ended(long, 9.0, context=200)
    router.route("new", 100, 10.0)
    assert [router.home(name) for name in ("long", "short", "busy", "new")] == ["r", None, "r", "r"]
    router.route("newer", 100, 11.0)
    assert [router.home(name) for name in ("long", "busy", "new", "newer")] == [None, "r", "r", "r"]
    router.route("newest", 100, 12.0)  # all have a request in flight
    assert [router.home(name) for name in ("busy", "new", "newer", "newest")] == [None, "r", "r", "r"]
    router.ended(busy, 13.0, context=200)
    assert len(router) == 3


def test_a_program_that_ends_with_a_request_is_forgotten_unless_it_has_begun_again():
    router = router_of(2)
    first, second = (router.route("p", 100, 0.0) for _ in range(2))
    router.ended(first, 1.0, context=200, last=True)
    assert router.home("p") == first.replica, "another request is in flight"
    router.ended(second, 2.0, context=300, last=True)
    assert (len(router), router.fleet.homes.sum()) == (0, 0)


def test_what_a_replica_says_late_is_about_a_program_that_has_begun_again():
    router = router_of(2)
    route = router.route("p", 100, 5.0)
    home, other = route.replica, 1 - route.replica
    router.gone("p", home, 9.0)  # it is in flight
    router.ended(route, 6.0, context=200)
    router.gone("p", home, 5.5)
    router.gone("p", other, 9.0)
    router.gone("unknown", home, 9.0)
    assert router.home("p") == home
    router.gone("p", home, 6.0)
    assert (len(router), router.fleet.homes.sum()) == (0, 0)
    router.settle("p", home, 7.0, context=50)
    router.gone("p", home, 6.5)
    assert router.home("p") == home


def test_programs_expire_that_were_last_heard_of_earlier():
    router = router_of(2)
    busy = router.route("busy", 100, 0.0)
    for i in range(5):
        router.ended(router.route(i, 100, float(i)), i + 0.5, context=200)
    router.expire(3.0)
    assert [router.home(i) is not None for i in ("busy", *range(5))] == [True, False, False, False, True, True]
    router.expire(9.0)
    assert len(router) == 1
    router.ended(busy, 10.0, context=200)
    router.expire(9.5)
    assert len(router) == 1
    router.expire(11.0)
    assert (len(router), router.fleet.homes.sum()) == (0, 0)


def test_the_table_may_hold_one_program_and_requests_of_nothing():
    router = Router(max_programs=1)
    router.join("r", 0.0)
    for i in range(5):
        router.ended(router.route(i, 0, 5.0 - i, parent=i), 5.0 - i, context=0)  # the clock may run backwards
    assert len(router) == 1
    assert not router.fleet.requests.any()


def test_the_place_of_a_replica_that_left_is_used_again():
    router = router_of(3)
    router.leave(1, 0.0)
    router.join("new", 0.0)
    assert len(router.fleet) == 3
    assert np.isneginf(router.fleet.reported_at).sum() == 1


@pytest.mark.parametrize("name", sorted(RULES))
def test_equal_events_are_placed_alike(name):
    def run():
        router = router_of(4, rule=make_rule(name, seed=3))
        chosen = []
        for i in range(60):
            route = router.route(i % 13, 500 + 37 * i, float(i))
            chosen.append(route.replica)
            if i % 3:
                router.ended(route, i + 0.5, context=600 + 37 * i)
        return chosen

    assert run() == run()
