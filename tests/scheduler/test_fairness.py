"""Shares of tenants: what the rule says, and what it does in a scheduler."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.loop import Loop, make

from astraea_jax.scheduler.policies import SERVING
from astraea_jax.scheduler.program import Request
from astraea_jax.scheduler.transfer import HostTier

LARGE = {"num_pages": 4001, "max_waiting": 2000, "max_context": 400}


CREDIT_S = 0.04
"""A few steps: those of the costs that a scheduler guesses first take about 5 ms."""


def shared(policy: str = "fcfs", **sizes) -> Loop:
    scheduler = make(policy, **sizes)
    scheduler._planner.tenants.credit_s = CREDIT_S
    return Loop(scheduler)


def flood(loop: Loop, requests: int = 1300, prompt: int = 8, output: int = 300, owner: str = "flood") -> list[Request]:
    return [loop.scheduler.submit([i % 50] * prompt, output, owner=owner, now=loop.now) for i in range(requests)]


def turns_until(loop: Loop, *requests, limit: int = 2000) -> int:
    """Turns until requests have ended."""
    turns = 0
    while any(request.finish_reason is None for request in requests):
        loop.turn()
        turns += 1
        assert turns < limit, "no end in sight"
    return turns


CONTINUOUS = [policy for policy in SERVING if policy != "astraea-paper"]
"""Policies that start requests while others run; the paper's batches run to their end, whoever waits."""


@pytest.mark.parametrize("policy", CONTINUOUS)
def test_two_tokens_do_not_wait_for_1300_long_requests(policy):
    loop = shared(policy, **LARGE, max_seqs=8, max_step_tokens=64)
    flood(loop)
    for _ in range(20):
        loop.turn()
    for _ in range(5):
        small = loop.scheduler.submit([1, 2, 3], 2, owner="small", now=loop.now)
        assert turns_until(loop, small) <= 5
        for _ in range(10):
            loop.turn()
    loop.scheduler.check()
    assert loop.scheduler.stats().running == 8  # nobody idles the device


def test_without_fairness_it_would_wait_for_all_of_them():
    loop = shared("fcfs", **LARGE, max_seqs=8, max_step_tokens=64)
    flood(loop, requests=100, output=30)
    small = loop.scheduler.submit([1, 2, 3], 2, owner="flood", now=loop.now)
    assert turns_until(loop, small) > 300


def test_long_prompts_yield_to_a_short_one():
    """A flood's prompts would fill every step for long."""
    loop = shared("fcfs", **LARGE, max_seqs=8, max_step_tokens=16)
    flood(loop, requests=50, prompt=390, output=2)
    for _ in range(9):
        loop.turn()
    small = loop.scheduler.submit([1, 2, 3], 2, owner="small", now=loop.now)
    assert turns_until(loop, small) <= 5


def test_pages_are_taken_from_a_flood():
    """Four rows of the flood hold nearly all pages, and grow."""
    loop = shared("astraea", num_pages=41, max_seqs=4, max_context=140, max_waiting=100, max_step_tokens=40)
    flood(loop, requests=50, prompt=30, output=100)
    for _ in range(8):
        loop.turn()
    small = loop.scheduler.submit([1] * 24, 12, owner="small", now=loop.now)
    assert turns_until(loop, small) <= 20
    assert small.preemptions == 0
    loop.drain(20_000)


def test_the_only_slot_goes_from_hand_to_hand():
    loop = shared("fcfs", num_pages=400, max_seqs=1, max_context=400, max_waiting=100)
    flood(loop, requests=3)
    loop.turn()
    other = [loop.scheduler.submit([1] * 8, 300, owner="other", now=loop.now) for _ in range(3)]
    turns = turns_until(loop, other[0], limit=1500)
    assert turns <= 2 * 300 + 100  # half of the machine, rather than after all three
    loop.drain(20_000)
    assert loop.scheduler.stats().preemptions < 300


@pytest.mark.parametrize("weights", [{}, {"a": 3.0}, {"a": 0.25}])
def test_two_floods_get_service_by_their_weights(weights):
    loop = shared("fcfs", **LARGE, max_seqs=8, max_step_tokens=64, tenant_weights=weights)
    requests = {owner: flood(loop, 200, output=40, owner=owner) for owner in "ab"}
    for _ in range(400):
        loop.turn()
    served = {owner: sum(len(request.output) for request in requests[owner]) for owner in "ab"}
    weight = weights.get("a", 1.0)
    assert served["a"] / sum(served.values()) == pytest.approx(weight / (weight + 1.0), abs=0.1)


def test_who_has_weight_0_is_served_while_nobody_else_waits():
    loop = shared("fcfs", **LARGE, max_seqs=4, max_step_tokens=64, tenant_weights={"batch": 0.0})
    batch = flood(loop, 6, output=30, owner="batch")
    loop.turn()
    loop.turn()
    assert sum(request.slot >= 0 for request in batch) == 4
    paid = flood(loop, 20, output=10, owner="paid")
    for _ in range(6):
        loop.turn()
    assert not any(request.slot >= 0 for request in batch)
    turns_until(loop, *paid)
    assert all(request.finish_reason is None for request in batch)
    loop.drain()
    assert {request.finish_reason for request in batch} == {"length"}


def test_tenants_of_weight_0_alone_are_served():
    loop = shared("fcfs", tenant_weights={"a": 0.0, "b": 0.0})
    requests = flood(loop, 3, output=9, owner="a") + flood(loop, 2, output=9, owner="b")
    loop.drain()
    assert {request.finish_reason for request in requests} == {"length"}


def test_use_in_idle_hours_is_no_debt_and_no_use_is_no_saving():
    loop = shared("fcfs", **LARGE, max_seqs=2, max_step_tokens=64)
    flood(loop, 6, output=300, owner="old")
    for _ in range(1000):
        loop.turn()
    new, old = (flood(loop, 6, output=300, owner=owner) for owner in ("new", "old"))
    for _ in range(1000):
        loop.turn()
    served = [sum(len(request.output) for request in requests) for requests in (new, old)]
    total = loop.scheduler._planner.tenants
    assert served[0] == pytest.approx(1000, abs=120)  # half of two slots
    assert total.contend


@example("fcfs", dict.fromkeys("abc", 0.5), {"a": (1, 1), "b": (1, 1), "c": (1, 3)}, 4, HostTier())  # of one step
@settings(max_examples=25, deadline=None)
@given(
    policy=st.sampled_from([policy for policy in CONTINUOUS if policy != "thunderagent"]),  # which holds programs back
    weights=st.fixed_dictionaries({owner: st.sampled_from([0.5, 1.0, 2.0]) for owner in "abc"}),
    sizes=st.fixed_dictionaries({owner: st.tuples(st.integers(1, 60), st.integers(1, 40)) for owner in "abc"}),
    slots=st.integers(3, 8),
    host=st.sampled_from([HostTier(), HostTier(pages=400, staging=40)]),
)
def test_tenants_who_keep_requests_waiting_stay_within_a_constant(policy, weights, sizes, slots, host):
    """The lag of two backlogged tenants, in seconds of the machine by weight; and the device never idles.

    More wait of each than there are slots: whose last one has started is not backlogged, and what it lags is forgotten.
    """
    loop = shared(policy, num_pages=200, max_seqs=slots, max_context=120, host=host, tenant_weights=weights)
    for _ in range(250):
        for owner, (prompt, output) in sizes.items():
            while sum(r.program.owner == owner for r in loop.scheduler._admission._queue) <= slots:
                loop.scheduler.submit([len(owner)] * prompt, output, owner=owner, now=loop.now)
        planned, full = len(loop.log), loop.scheduler.stats().running == slots
        loop.turn()
        busy = len(loop.log) > planned or loop.transfers or full
        assert busy, "the device idles while a slot is free"
    tenants = loop.scheduler._planner.tenants
    served = np.array([tenants._served[tenants._at[owner]] for owner in "abc"])
    longest = 40 * 0.006 / min(weights.values())  # seconds until rows that run have ended, none of which is preempted
    assert np.ptp(served) <= 2 * CREDIT_S + longest
    loop.scheduler.check()


def any_arrivals(loop: Loop, seed: int) -> None:
    """Requests of three tenants, of any length and at any time, some in sessions; all of them end."""
    draw, sessions = np.random.default_rng(seed), {}
    for _ in range(60):
        for _ in range(draw.integers(3)):
            name = str(draw.choice(["a", "b", "c"])), int(draw.integers(3))
            last = sessions.get(name)
            if loop.scheduler.stats().waiting < 5 and (last is None or last.finish_reason):
                before = [*last.prompt, *last.output][: draw.integers(30)] if last else []
                prompt, output = [*before, *range(draw.integers(1, 12))], int(draw.integers(1, 7))
                more = {"owner": name[0], "program": name, "priority": int(draw.integers(-1, 2)), "now": loop.now}
                sessions[name] = loop.scheduler.submit(prompt, output, **more)
        loop.now += 100 * (draw.random() < 0.1)
        loop.turn()
        loop.scheduler.check()
    loop.drain()


@pytest.mark.parametrize("policy", SERVING)
@pytest.mark.parametrize("host", [HostTier(), HostTier(pages=20, staging=4)], ids=["device", "host"])
def test_all_requests_of_several_tenants_end(policy, host):
    for seed in range(3):
        any_arrivals(shared(policy, max_waiting=12, host=host), seed)


def test_who_has_just_started_may_make_room_for_a_tenant_within_its_part():
    """It has started because the first in order did not fit, which has put its own tenant over its part."""
    loop = shared(max_waiting=12, num_pages=17, host=HostTier(pages=12, staging=3))
    planner, at_once = loop.scheduler._planner, []
    preempt = planner.admission.preempt

    def counted(victim: Request, now: float) -> None:
        at_once.append(victim.started == now)
        preempt(victim, now)

    planner.admission.preempt = counted
    any_arrivals(loop, seed=99)
    assert any(at_once), "nobody was preempted in the step that started it"


@pytest.mark.parametrize("policy", CONTINUOUS)
@pytest.mark.parametrize("requests", [1, 3])
def test_tenants_do_not_preempt_each_other_for_ever(policy, requests):
    """A pool holds one of their contexts, and is worth more to each than the time that it may be behind."""
    loop = shared(policy, num_pages=11)
    loop.scheduler._planner.tenants.credit_s = 0.0
    for owner in "abc":
        flood(loop, requests, prompt=20, output=12, owner=owner)
    loop.drain()
    loop.scheduler.check()


def test_one_tenant_is_not_even_counted():
    loop = shared("astraea")
    flood(loop, 5, output=9, owner="only")
    loop.turn()
    tenants = loop.scheduler._planner.tenants
    assert not tenants.contend
    loop.drain()
    assert tenants._virtual == 0.0
    assert not tenants._served.any()
