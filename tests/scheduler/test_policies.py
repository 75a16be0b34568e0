"""Policies against small examples worked out by hand from their papers, and what every policy owes to everybody."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.waiting import ROOM, order, request

from astraea_jax.scheduler.policies import ABLATION, POLICIES, make_policy
from astraea_jax.scheduler.policies.astraea_mlfq import ALPHA, THRESHOLDS
from astraea_jax.scheduler.policies.plas import BETA, QUANTUM, QUEUES, queue_of
from astraea_jax.scheduler.policy import Pressure, WaitingQueue
from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.simulation.engine import Sizes
from astraea_jax.scheduler.simulation.machines import MACHINES
from astraea_jax.scheduler.simulation.oracle import Oracle
from astraea_jax.scheduler.simulation.simulator import Simulator
from astraea_jax.scheduler.simulation.trace import TraceProgram, TraceRequest
from astraea_jax.scheduler.transfer import HostCopy, HostPages
from astraea_jax.scheduler.wait import WaitOutcome


def told(outputs: dict[str, list[int]], tool_s: float = 0.0) -> Oracle:
    """An oracle that knows the output lengths of each program's requests; a token takes a second, prefill nothing."""
    programs = []
    for name, lengths in outputs.items():
        requests, held = [], 0
        for i, output in enumerate(lengths):
            last = i == len(lengths) - 1
            requests.append(TraceRequest(held, 10, output, None if last else "t", 0.0 if last else tool_s))
            held += 10 + output
        programs.append(TraceProgram(name, tuple(requests)))
    oracle = Oracle(programs)
    oracle.steps.mean_step_s = 1.0
    oracle.steps.costs = replace(oracle.steps.costs, per_token_s=0.0)
    return oracle


def test_shortest_request_first():
    policy = make_policy("sjf", told({"p1": [50], "p2": [5], "p3": [20]}))
    assert order(policy, [request(1), request(2), request(3)], now=1) == [2, 3, 1]


def test_shortest_remaining_program_first():
    policy = make_policy("srpt-clairvoyant", told({"p1": [5, 50], "p2": [30], "p3": [1, 1, 1]}))
    assert order(policy, [request(1), request(2), request(3)], now=1) == [3, 2, 1]


def test_response_ratio_overtakes_with_time():
    policy = make_policy("hrrn", told({"p1": [10], "p2": [2]}))
    long, short = request(1, submitted=0.0), request(2, submitted=17.0)
    # At 18 s: long (18 + 10) / 10 = 2.8, short (1 + 2) / 2 = 1.5. At 22 s: 3.2 against 3.5.
    assert order(policy, [long, short], now=18.0) == [1, 2]
    assert order(policy, [long, short], now=22.0) == [2, 1]


def test_plas_orders_by_attained_service_in_doubling_queues():
    assert [queue_of(s) for s in (0, QUANTUM - 1, QUANTUM, 3 * QUANTUM - 1, 3 * QUANTUM)] == [0, 0, 1, 1, 2]
    policy = make_policy("plas", told({"p1": [1], "p2": [1], "p3": [1]}))
    much = request(1, submitted=0, service=10 * QUANTUM, ran_s=1.0)
    little = request(2, submitted=5, service=10.0, ran_s=1.0)
    less = request(3, submitted=4, service=90.0, ran_s=1.0)
    assert order(policy, [much, little, less], now=6) == [3, 2, 1]  # equal queues: by arrival of the call
    assert order(policy, [much, little, less], now=BETA) == [1, 3, 2]  # (19 + 1) / 1 reaches beta
    assert queue_of(2**20 * QUANTUM) == QUEUES - 1
    back = request(4, submitted=30, service=10 * QUANTUM, ran_s=2.0, waited_s=10.0)
    fresh = request(5, submitted=50, service=10.0)
    assert order(policy, [back, fresh], now=57) == [5, 4]  # (37 + 2) / 2, its earlier wait included
    assert order(policy, [back, fresh], now=58) == [4, 5]  # (38 + 2) / 2


def test_lamps_orders_by_memory_time_area():
    oracle = told({"p1": [10, 1], "p2": [4, 1]}, tool_s=1000.0)
    policy = make_policy("lamps", oracle)
    # p1: 10 s at (100 + 110) / 2 = 1050; p2: 4 s at (600 + 604) / 2 = 2408; waits cost a prefill, which is free here.
    first, second = request(1, prompt=100), request(2, prompt=600)
    assert policy.features(first)[0] == pytest.approx(1050)
    assert policy.features(second)[0] == pytest.approx(2408)
    assert order(policy, [second, first], now=1) == [1, 2]
    second.queued = -200.0  # has waited more than 100 iterations of a second
    assert order(policy, [second, first], now=1) == [2, 1]


def test_cachettl_serves_pinned_programs_first():
    policy = make_policy("cachettl", told({}))
    old, young, gone = (Program(n, float(n), pages=[n]) for n in (1, 2, 5))
    policy.strategy._until.update({old: 10.0, young: 10.0, gone: 10.0})
    gone.pages = []  # evicted, so its pin is worth nothing
    back, fresh = request(1, young, submitted=5.0), request(2, Program(3, 0.0), submitted=0.0)
    preempted, lost = request(3, Program(4, 4.0), submitted=4.0), request(4, gone, submitted=4.0)
    preempted.preemptions = 1
    assert order(policy, [lost, fresh, back, preempted], now=6.0) == [3, 1, 2, 4]


def test_mori_serves_what_lies_on_the_device_first_and_of_that_the_least_idle():
    policy = make_policy("mori", told({}))
    programs = [Program(n, 0.0, wait_began=10.0, turns=1) for n in (1, 2, 3, 4)]
    busy, idle, host, nowhere = programs
    busy.pages, idle.pages, host.copies = [1], [2], [HostCopy(0, 1, HostPages(1))]
    waiting = []
    for number, (program, ran_s, tool_s) in enumerate(
        ((nowhere, 9.0, 0.0), (host, 9.0, 0.0), (idle, 2.0, 2.0), (busy, 4.0, 2.0)), 1
    ):
        program.last = request(10 + number, program)
        program.last.started = 10.0 - ran_s
        waiting.append(request(number, program))
        waiting[-1].wait = WaitOutcome(1.0, tool_s)
        waiting[-1].queued = waiting[-1].submitted = 10.0 + tool_s
    assert order(policy, waiting, now=20.0) == [4, 3, 2, 1]  # a third of its time idle, before one half
    assert policy.features(waiting[3])[:2] == (0, pytest.approx(1 / 3))
    for program in programs:
        policy.forgotten(program)
    assert policy.features(waiting[3])[:2] == (0, 0.0)


def test_agentsched_turns_cache_first_as_memory_tightens():
    policy = make_policy("agentsched", told({"p1": [10], "p2": [10]}))
    cached, short = request(1, prompt=2000), request(2, prompt=300)
    cached.matched = cached.program.kept = 1900
    queue = WaitingQueue(3)
    for s in (cached, short):
        queue.push(s, policy.features(s))
    tight = Pressure(16, pages=100, free=0, retained=0, running=5, host_tier=False)
    assert list(queue.first(policy, 0.0, tight, 1)) == [cached]  # 109 new tokens against 310
    policy_hit = policy.features(cached)
    assert policy_hit[:2] == (0.95, 110.0)


def test_thunderagent_pauses_acting_programs_first_and_shortest_first():
    policy = make_policy("thunderagent", told({}))
    room = Pressure(16, pages=10, free=0, retained=0, running=1, host_tier=False)  # 160 tokens
    programs = [request(n, prompt=size) for n, size in ((1, 100), (2, 60), (3, 40))]
    for s in programs:
        policy.queued(s, 0.0)
        policy.admitted(s, 0.0)
    policy._paused.clear()
    policy.ended(programs[0], 9.9)  # acting: counts nearly in full
    reasoning = request(4, prompt=50)
    policy.queued(reasoning, 10.0)
    assert policy.admits(reasoning, 10.0, room)  # 60 + 40 + 50 fit once the acting program is paused
    assert list(policy._paused) == [programs[0].program]
    newcomer = request(5, prompt=5)
    policy.queued(newcomer, 11.0)
    assert not policy.admits(newcomer, 11.0, room)  # new programs wait while anything is paused
    policy.forgotten(programs[1].program)
    policy.forgotten(programs[2].program)
    assert policy.admits(newcomer, 20.0, room)  # restored at the next interval


def test_algorithm_1_of_astraea_on_a_small_case():
    policy = make_policy("astraea-paper", told({"a": [500, 1], "b": [10, 1], "c": [20, 1]}))
    a, b, c = (Program(n, 0.0, key=name) for n, name in enumerate("abc"))
    first = [request(n, p, prompt=10) for n, p in ((1, a), (2, b), (3, c))]
    # All in queue 0 with no wait: ratio 1 each; then by wait, b has the shortest time and rises fastest.
    assert order(policy, first, now=5.0) == [2, 3, 1]
    for s in first:
        assert policy.admits(s, 5.0, ROOM)
        policy.admitted(s, 5.0)
    late = request(4, Program(4, 6.0, key="late"))
    assert not policy.admits(late, 6.0, ROOM)  # the batch runs to completion
    for s, service in zip(first, (510.0, 20.0, 30.0), strict=True):
        s.service = service
        policy.ended(s, 100.0)
    assert [p.job.level for p in (a, b, c)] == [
        1,
        0,
        0,
    ]  # 510 > theta_0 demotes; tool calls promote
    assert policy.admits(late, 101.0, ROOM)


def test_astraea_mlfq_keeps_the_order_without_the_batches():
    paper, mlfq = (
        make_policy(name, told({"p1": [10], "p2": [10], "p3": [10]})) for name in ("astraea-paper", "astraea-mlfq")
    )
    waiting = [request(1, level=2), request(2, level=1, waited_s=5.0), request(3, level=1, waited_s=15.0)]
    assert order(paper, waiting, now=5.0) == order(mlfq, waiting, now=5.0) == [3, 2, 1]
    for s in waiting:
        assert mlfq.admits(s, 5.0, ROOM)
        mlfq.admitted(s, 5.0)
    late = request(4, Program(4, 6.0, key="late"))
    assert mlfq.admits(late, 6.0, ROOM)  # though others still run
    waiting[1].service = THRESHOLDS[1] + 1
    waiting[2].service = THRESHOLDS[1]
    for s in waiting:
        mlfq.ended(s, 9.0)
    assert [s.program.job.level for s in waiting] == [1, 2, 0]  # a tool call, a cost above the threshold, one at it


@pytest.mark.parametrize("name", ["astraea-paper", "astraea-mlfq"])
def test_the_lowest_queue_of_astraeas_levels_ages(name):
    policy = make_policy(name, told({"p1": [10, 1], "p2": [10, 1]}))
    low = request(1, level=len(THRESHOLDS))
    high = request(2, submitted=10 * ALPHA - 20)
    assert order(policy, [low, high], now=10 * ALPHA - 15) == [2, 1]
    assert order(policy, [low, high], now=10 * ALPHA) == [1, 2]


def test_unknown_policies_list_the_known():
    with pytest.raises(ValueError, match=r"'lifo'.*astraea"):
        make_policy("lifo")


# -- what every policy owes ------------------------------------------------------------------------------------


@st.composite
def workloads(draw):
    """Few programs, large against the pool, with tools of every length, zero included."""
    programs = []
    for number in range(draw(st.integers(2, 10))):
        requests, held = [], 0
        for i in range(turns := draw(st.integers(1, 4))):
            new, output = draw(st.integers(1, 300)), draw(st.integers(1, 60))
            cached = held if draw(st.booleans()) else held // 2
            last = i == turns - 1
            tool_s = 0.0 if last else draw(st.sampled_from([0.0, 0.01, 3.0, 1000.0]))
            requests.append(TraceRequest(cached, new, output, None if last else "t", tool_s))
            held = cached + new + output
        programs.append(TraceProgram(f"p{number}", tuple(requests), draw(st.floats(0, 5))))
    return programs


@pytest.mark.parametrize("name", [*POLICIES, *ABLATION])
@settings(max_examples=12, deadline=None)
@given(workloads(), st.sampled_from([0, 300, 10**6]), st.floats(1.0, 3.0))
def test_every_program_ends_under_every_policy(name, programs, host, tightness):
    longest = max(p.longest for p in programs)
    pool = math.ceil(longest * tightness) + 32
    predictor = Oracle(programs, noise=0.5) if name == "srpt-clairvoyant" else Predictor()
    sizes = Sizes(pool, page_size=16, max_seqs=4, max_step_tokens=64, host_tokens=host, staging_tokens=64)
    simulator = Simulator(programs, make_policy(name, predictor), MACHINES["cpu-tiny"], sizes)
    outcome = simulator.run()
    simulator.scheduler.check()
    assert all(r.ended >= r.arrival for r in outcome.records)
    assert [len(r.spans) for r in outcome.records] == [len(p.requests) for p in programs]
    assert outcome.stats.free_pages == pool // 16
    assert outcome.stats.finished == len(programs)


@pytest.mark.parametrize("name", ["astraea", "program-fcfs", "hrrn", "plas"])
def test_a_large_program_gets_its_turn_in_an_endless_stream_of_small_ones(name):
    small = [TraceProgram(f"s{i}", (TraceRequest(0, 40, 20, None, 0.0),), arrival_s=0.004 * i) for i in range(3000)]
    large = TraceProgram("large", (TraceRequest(0, 900, 50, "t", 0.1), TraceRequest(950, 30, 50)), arrival_s=0.5)
    sizes = Sizes(1200, page_size=16, max_seqs=8, max_step_tokens=256)
    outcome = Simulator([*small, large], make_policy(name), MACHINES["cpu-tiny"], sizes).run()
    ended = next(r.ended for r in outcome.records if r.program is large)
    assert ended < 0.8 * outcome.makespan_s


def test_columns_follow_their_requests():
    queue, requests = WaitingQueue(1), [request(n) for n in range(1, 200)]
    rng = np.random.default_rng(0)
    policy = make_policy("fcfs")
    for s in requests:
        queue.push(s, (float(rng.random()),))
    scores = {s: float(queue._features[queue._at[s]][0]) for s in requests}
    for s in rng.permutation(np.array(requests, dtype=object))[:150]:
        queue.remove(s)
        del scores[s]
        assert list(queue.first(policy, 0.0, ROOM, 3)) == sorted(scores, key=scores.__getitem__)[:3]
