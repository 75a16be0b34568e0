"""Residency strategies against small examples worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from astraea_jax.scheduler.costs import StepCosts
from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.strategies import DISCARD, EVICT_FIRST, KEEP, STRATEGIES, make_strategy, time_to_live
from astraea_jax.scheduler.wait import BoundedWait, Wait


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


def test_continuum_gives_pinned_programs_last_and_of_those_the_youngest_first():
    strategy = make_strategy("continuum", Predictor())
    old, young, free = (Program(number, float(number)) for number in (1, 2, 3))
    strategy._until.update({old: 10.0, young: 10.0})
    assert list(strategy.order([old, young, free], now=5.0)) == [free, young, old]


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
