"""The default policy: what its order weighs, whom its gate holds back, and what patience promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.waiting import ROOM, order, request

from astraea_jax.scheduler.contexts import HALF_LIFE_S
from astraea_jax.scheduler.costs import StepCosts, StepFit
from astraea_jax.scheduler.policies import make_policy
from astraea_jax.scheduler.policies.astraea import PATIENCE, Astraea, Gate, Terms
from astraea_jax.scheduler.policy import Pressure
from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.simulation.engine import Sizes
from astraea_jax.scheduler.simulation.machines import MACHINES
from astraea_jax.scheduler.simulation.simulator import Simulator
from astraea_jax.scheduler.simulation.trace import TraceProgram, TraceRequest


def test_astraea_prefers_little_memory_and_few_turns_until_the_wait_outweighs_it():
    predictor = Predictor()
    for _ in range(200):  # everybody runs exactly five requests
        for turn in range(5):
            predictor.hazards.observe(turn, last=turn == 4)
        predictor.turns.add(5)
    policy = make_policy("astraea", predictor)
    new, ending = Program(0, 0), Program(0, 0)
    ending.job.turns = 4
    assert predictor.turns_index(ending) < predictor.turns_index(new) - 1
    small, large = request(1, prompt=100), request(2, prompt=1000)
    assert order(policy, [large, small], now=1.0) == [1, 2]
    begun, done = request(3, turns=0), request(4, turns=4)
    assert order(policy, [begun, done], now=1.0) == [4, 3]
    waited = request(5, prompt=1000, waited_s=1e5)
    assert order(policy, [small, waited], now=1.0) == [5, 1]


def test_the_fixed_cost_of_a_prefill_outweighs_tokens_in_the_size():
    """Where it is all that a request costs, the longer wait goes first whatever the contexts are."""
    firsts = {}
    for per_prefill_s in (0.0, 10.0):
        predictor = Predictor()
        predictor.steps.costs = StepCosts(1e-3, per_prefill_s, 1e-5, 1e-6)
        policy = make_policy("astraea", predictor)
        policy.scores(np.zeros((1, policy.columns)), 0.0, ROOM)  # tells it the size of the pool
        waited, small = request(1, prompt=1000, waited_s=1.0), request(2, prompt=100, waited_s=0.5)
        firsts[per_prefill_s] = order(policy, [waited, small], now=0.0)[0]
    assert firsts == {0.0: 2, 10.0: 1}


@pytest.mark.parametrize(
    ("base_s", "costs", "skips"), [(1e-3, True, Astraea.max_skips), (1e-5, True, 0), (1e-5, False, Astraea.max_skips)]
)
def test_astraea_backfills_only_where_batching_saves_time(base_s, costs, skips):
    predictor = Predictor()
    predictor.steps.costs = StepCosts(base_s, 0.0, 1e-5, per_context_s=1e-7)  # 1.6 ms for the context of a full pool
    policy = Astraea(predictor, Terms(costs=costs))
    order(policy, [request(1)], now=1.0)
    assert policy.max_skips == skips


class KnownCosts(StepFit):
    """Costs that are known, so that no step teaches anything."""

    def __init__(self, costs: StepCosts):
        super().__init__()
        self.costs = costs

    def observe(self, plan, seconds):
        pass


def test_nobody_overtakes_what_does_not_fit_where_batching_saves_no_time():
    """A pool of three contexts, and steps whose time is all attention: programs start in the order of arrival."""
    machine = replace(MACHINES["cpu-tiny"], steps=StepCosts(1e-6, 0.0, 1e-6, 1e-6))
    lengths = [500, 900, 100, 600, 100, 800, 300, 100, 700, 200]
    programs = [
        TraceProgram(f"p{i}", (TraceRequest(0, n, 50),), arrival_s=0.001 * i) for i, n in enumerate(lengths * 5)
    ]
    predictor = Predictor()
    predictor.steps = KnownCosts(machine.steps)
    sizes = Sizes(1200, page_size=16, max_seqs=8, max_step_tokens=256)
    policy = Astraea(predictor, Terms(turns=False, memory=False))
    records = Simulator(programs, policy, machine, sizes).run().records
    begun = [r.spans[0][1] for r in records]
    assert begun == sorted(begun)


def test_the_gate_counts_contexts_that_fade():
    gate = Gate()
    room = Pressure(16, pages=10, free=0, retained=0, running=1, host_tier=False)  # 160 tokens
    one, two = (request(n, prompt=100) for n in (1, 2))
    assert gate.admits(one, 0.0, room)
    gate.runs(one, 0.0)
    assert gate.admits(two, 0.0, room)  # nothing has been computed again: it is open
    gate.recomputes(50.0, 0.0)
    assert not gate.admits(two, 0.0, room)
    other = request(9, prompt=10)
    gate.runs(other, 0.0)
    gate.waits(one, 0.0)
    assert not gate.admits(two, 0.0, room)
    assert gate.admits(request(4, one.program), 0.0, room)  # who has begun goes on
    assert gate.admits(two, HALF_LIFE_S * 1.01, room)  # 10 + 50 + 100 fit
    gate.forget(one.program)
    gate.forget(other.program)
    assert gate._contexts.faded(0.0) == pytest.approx(0.0, abs=1e-6)
    assert gate._contexts.active == 0.0


def test_the_gate_shuts_above_one_share_and_opens_below_another():
    gate, room = Gate(), Pressure(16, pages=10, free=0, retained=0, running=1, host_tier=False)  # 160 tokens
    gate.runs(request(1, prompt=100), 0.0)
    large, exact = request(2, prompt=61), request(3, prompt=60)
    gate.recomputes(0.24 * Gate.WINDOW_S, 0.0)
    assert gate.admits(large, 0.0, room)
    gate.recomputes(0.02 * Gate.WINDOW_S, 0.0)
    assert not gate.admits(large, 0.0, room)
    assert gate.admits(exact, 0.0, room)  # 100 + 60 fit
    assert not gate.admits(large, 1.6 * Gate.WINDOW_S, room)  # 0.26 / e ** 1.6 = 0.052: it stays shut
    assert gate.admits(large, 1.7 * Gate.WINDOW_S, room)  # 0.047


@pytest.mark.parametrize(("host_tier", "gated"), [(True, True), (False, False), (False, True)])
def test_only_new_programs_are_gated_and_only_where_kv_is_lost(host_tier, gated):
    policy = Astraea(Predictor(), Terms(gate=gated))
    pressure = Pressure(16, pages=10, free=0, retained=0, running=1, host_tier=host_tier)
    begun, new = request(1, prompt=100), request(2, prompt=100)
    policy.admitted(begun, 0.0)
    policy._gate.recomputes(50.0, 0.0)
    assert policy.admits(request(3, begun.program), 0.0, pressure)
    assert policy.admits(new, 0.0, pressure) is (host_tier or not gated)


WAITS = st.integers(0, 800).map(lambda n: n / 8)
"""In typical running times; apart by more than rounding."""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1000), WAITS, WAITS, st.integers(0, 30)), min_size=2, max_size=30))
def test_whoever_has_waited_beyond_patience_goes_before_everybody_else(history):
    policy = make_policy("astraea")
    typical = policy.predict.job_s()
    waiting = [
        request(n, prompt=prompt, waited_s=waits * typical, ran_s=runs * typical, turns=turns)
        for n, (prompt, waits, runs, turns) in enumerate(history, 1)
    ]
    served = [waiting[number - 1].program.job.waited_s for number in order(policy, waiting, now=0.0)]
    starving = [w for w in served if w > PATIENCE * typical]
    assert served[: len(starving)] == sorted(starving, reverse=True)


def test_running_is_not_waiting():
    """Who has run for long, and never waited, does not jump the queue before those who have waited."""
    policy = make_policy("astraea")
    typical = policy.predict.job_s()
    ran = request(1, ran_s=1000 * typical, prompt=1000)
    waited = request(2, waited_s=(PATIENCE + 1) * typical, prompt=1000)
    waits = request(3, waited_s=(PATIENCE - 5) * typical, ran_s=0.0, prompt=1)
    assert order(policy, [ran, waited, waits], now=0.0) == [2, 3, 1]


class Steady(Predictor):
    """Whose typical job runs for 50 ms."""

    def job_s(self) -> float:
        return 0.05


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 60), st.integers(2, 40), st.integers(600, 1100), st.floats(0.1, 0.4), st.booleans())
def test_nobody_who_came_later_overtakes_a_program_beyond_its_patience(prompt, output, size, arrival, host):
    small = [TraceProgram(f"s{i}", (TraceRequest(0, prompt, output),), arrival_s=0.002 * i) for i in range(800)]
    large = TraceProgram("large", (TraceRequest(0, size, 50),), arrival_s=arrival)
    tier = {"host_tokens": 10**6, "staging_tokens": 1000} if host else {}
    sizes = Sizes(1200, page_size=16, max_seqs=8, max_step_tokens=256, **tier)
    records = Simulator([*small, large], make_policy("astraea", Steady()), MACHINES["cpu-tiny"], sizes).run().records
    begun = next(r.spans[0][1] for r in records if r.program is large)
    deadline = arrival + PATIENCE * 0.05 + 0.05  # and a few steps
    assert sum(r.arrival > arrival and deadline < r.spans[0][1] < begun for r in records) <= Astraea.max_skips
