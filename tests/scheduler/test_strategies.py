"""Residency strategies against small examples worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from astraea_jax.scheduler.costs import StepCosts
from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.program import Program, Request
from astraea_jax.scheduler.rival_strategies import Cycles, time_to_live
from astraea_jax.scheduler.strategies import STRATEGIES, make_strategy
from astraea_jax.scheduler.strategy import DISCARD, EVICT_FIRST, KEEP
from astraea_jax.scheduler.wait import DEVICE, DIFFERS, EVICTED, HOST, RECOMPUTED, BoundedWait, Resumed, Wait


def test_infercept_gives_up_what_wastes_most():
    strategy = make_strategy("infercept", Predictor())
    strategy.predict.steps.costs = replace(strategy.predict.costs, per_token_s=1e-3)
    small_long = Program(1, 0.0, wait_began=0.0, kept=100)
    large_short = Program(2, 0.0, wait_began=9.0, kept=500)
    # At 10 s, keeping wastes 10 * 100 = 1000 and 1 * 500; dropping 0.1 * 100 = 10 and 0.5 * 500 = 250.
    assert list(strategy.order([large_short, small_long], now=10.0)) == [small_long, large_short]


def test_a_time_to_live_weighs_the_chance_to_return_against_the_time():
    assert time_to_live([1.0, 1.0, 1.0, 9.0], benefit_s=4.0) == 1.0  # 0.75 * 4 - 1 = 2 against 1 * 4 - 9
    assert time_to_live([1.0, 1.0, 1.0, 9.0], benefit_s=1.0) == 0.0
    assert time_to_live([1.0, 1.0, 1.0, 9.0], benefit_s=100.0) == 9.0
    assert time_to_live([], benefit_s=100.0) == 0.0


def test_cachettl_gives_pinned_programs_last_and_of_those_the_youngest_first():
    strategy = make_strategy("cachettl", Predictor())
    old, young, free = (Program(number, float(number), pages=[number]) for number in (1, 2, 3))
    strategy._until.update({old: 10.0, young: 10.0})
    assert list(strategy.order([old, young, free], now=5.0)) == [free, young, old]


def test_a_pin_outlasts_its_time_to_live_while_the_next_request_is_queued():
    strategy = make_strategy("cachettl", Predictor())
    back, away = (Program(number, 0.0, pages=[number]) for number in (1, 2))
    strategy._until.update({back: 10.0, away: 10.0})
    strategy.returned(back, 9.0)
    strategy.returned(away, 11.0)  # too late
    assert strategy.pinned(back, 50.0)
    assert not strategy.pinned(away, 11.0)
    strategy.started(Request(1, back, range(5), 1, frozenset(), False, 9.0, page_size=4), 60.0)
    assert not strategy.pinned(back, 60.0)


def test_cachettl_counts_the_delay_of_those_who_had_lost_their_place_in_either_tier():
    strategy = make_strategy("cachettl", Predictor())
    for source, why, expected in (
        (DEVICE, "", 0.0),
        (RECOMPUTED, DIFFERS, 0.0),
        (HOST, "", 4.0),
        (RECOMPUTED, EVICTED, 4.0),
    ):
        request = Request(1, Program(1, 0.0), range(5), 1, frozenset(), False, 1.0, page_size=4)
        request.resumed = Resumed(source, why)
        strategy.started(request, 5.0)
        assert strategy._queue_s == expected


def test_cachettl_brings_back_from_the_host_what_is_dearer_to_compute():
    predict = Predictor()
    strategy = make_strategy("cachettl", predict)
    predict.steps.costs = replace(predict.costs, per_token_s=1e-2, per_prefill_s=0.0)  # 16 s
    predict.transfers.observe(10_000, 300.0)  # 3 s
    program = Program(1, 0.0, pages=list(range(1, 101)), kept=1600)
    for host_tier, benefit_s in ((False, 16.0), (True, 3.0)):
        strategy.host_tier = host_tier
        strategy.waits(program, 0.0, 0.0)
        assert strategy._until[program] == pytest.approx(math.log(benefit_s), abs=1e-2)  # of tools exponential with 1 s


def test_mori_gives_the_idlest_first_and_those_who_are_back_last():
    strategy = make_strategy("mori", Predictor())

    def waits(number: int, ran_s: float, since: float) -> Program:
        program = Program(number, 0.0, wait_began=since, turns=1)
        program.last = Request(number, program, range(5), 1, frozenset(), False, 0.0, page_size=4)
        program.last.started = since - ran_s
        strategy.waits(program, 0.0, since)
        return program

    busy, idle, back = waits(1, 8.0, 8.0), waits(2, 2.0, 8.0), waits(3, 1.0, 2.0)
    strategy.returned(back, 9.0)
    # At 10 s: 2 of 10 s, 2 of 4, and 7 of 8, but that one's next request is queued.
    assert list(strategy.order([busy, idle, back], now=10.0)) == [idle, busy, back]
    strategy.waits(back, 0.0, 10.0)
    assert list(strategy.order([busy, idle, back], now=10.0)) == [back, idle, busy]


def test_mori_remembers_five_turns():
    cycles, program = Cycles(), Program(1, 0.0, wait_began=0.0)
    program.last = Request(1, program, range(5), 1, frozenset(), False, 0.0, page_size=4)
    for _ in range(3):
        cycles.add(program, 10.0)
    assert cycles.idleness(program, 10.0, waits=False) == 1.0
    program.last.started = -5.0
    for _ in range(4):
        cycles.add(program, 0.0)
    assert cycles.idleness(program, 0.0, waits=False) == 10 / 30
    assert cycles.idleness(program, 0.0, waits=True) == 0.0


def test_adaptive_keeps_without_pressure_and_gives_long_tools_first():
    predict = Predictor()
    strategy = make_strategy("adaptive", predict)
    for _ in range(50):
        predict.returned(Program(2, 0.0), 0.1)
    program = Program(1, 0.0, pages=list(range(1, 101)))
    predict.transfers.observe(10_000, 10.0)  # a millisecond a page: 0.2 s there and back
    assert strategy.waits(program, slack=0.9, now=0.0) == (KEEP, "no pressure")
    assert strategy.waits(program, slack=0.1, now=0.0) == (KEEP, "it returns soon")
    program.wait = BoundedWait.of(Wait(("sub-agent",)))
    for _ in range(50):
        predict.returned(program, 100.0)
    assert strategy.waits(program, slack=0.1, now=0.0) == (EVICT_FIRST, "its tool takes long")


def test_adaptive_moves_what_is_dearer_to_compute_than_to_bring_back():
    predict = Predictor()
    strategy = make_strategy("adaptive", predict)
    program = Program(1, 0.0, pages=list(range(1, 101)), kept=1600)
    predict.steps.costs = replace(predict.costs, per_token_s=1e-4, per_prefill_s=0.0)  # 0.16 s
    predict.transfers.observe(10_000, 10.0)  # 0.1 s
    assert strategy.offloads(program)
    for _ in range(100):
        predict.transfers.observe(10_000, 20.0)  # 0.2 s
    assert not strategy.offloads(program)
    strategy.running_tokens = 1600.0  # as many tokens wait in the batch while it is computed
    assert strategy.offloads(program)


def test_computing_again_is_dear_where_steps_with_prefill_are_whatever_a_token_costs():
    """On a CPU a step costs much and a token in it nothing: four steps more are not free."""
    predict = Predictor()
    strategy = make_strategy("adaptive", predict)
    program = Program(1, 0.0, pages=list(range(1, 65)), kept=1024)
    predict.steps.largest_step = 256
    predict.transfers.observe(10_000, 1.0)  # 6.4 ms
    predict.steps.costs = StepCosts(1e-3, per_prefill_s=5e-3, per_token_s=0.0, per_context_s=0.0)  # 15 ms
    assert predict.steps.again_s(1024) == pytest.approx(0.02)
    assert strategy.offloads(program)
    predict.steps.costs = StepCosts(1e-3, 0.0, 0.0, 0.0, per_pair_s=1e-7)  # 52 ms
    assert strategy.offloads(program)
    predict.steps.costs = StepCosts(1e-3, 1e-4, 0.0, 0.0)
    assert not strategy.offloads(program)


def test_the_fixed_strategies_are_fixed():
    program = Program(1, 0.0)
    decisions = {name: make_strategy(name, Predictor()).waits(program, 0.0, 0.0).action for name in STRATEGIES}
    assert decisions["always-keep"] == KEEP
    assert decisions["always-discard"] == DISCARD
    assert decisions["always-offload"] == "offload"


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match=r"'belady'; there are adaptive, always-keep"):
        make_strategy("belady", Predictor())
