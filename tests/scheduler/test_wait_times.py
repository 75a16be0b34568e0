"""Tests of what is learned of waits: by owner, by tool, by tools called together, and of humans."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.scheduler.distribution import Distribution
from astraea_jax.scheduler.prediction import Predictor
from astraea_jax.scheduler.program import Program
from astraea_jax.scheduler.wait import BoundedWait, Wait
from astraea_jax.scheduler.wait_times import HUMAN_S, MAX_KNOWN, MAX_TOOLS, maximum


def waiting(*tools, owner="", predictor=None, **hints) -> Program:
    program = Program(1, 0.0, owner=owner, wait=BoundedWait.of(Wait(tools, **hints)))
    if predictor is not None:
        predictor.wait_told(program)
    return program


def learn(predictor, seconds, *tools, owner="", times=40) -> None:
    for _ in range(times):
        predictor.returned(waiting(*tools, owner=owner), seconds)


def test_tools_are_known_apart_once_there_is_enough():
    predictor = Predictor()
    for i in range(100):
        learn(predictor, *((10.0, "slow") if i % 2 else (0.1, "fast")), times=1)
    assert predictor.wait_s(waiting("slow")) == pytest.approx(10.0)
    assert predictor.wait_s(waiting("slow"), elapsed_s=4.0) == pytest.approx(6.0)
    assert predictor.wait_s(waiting("never seen")) == pytest.approx(5.05)
    assert predictor.wait_s(Program(1, 0.0)) == pytest.approx(5.05)  # nobody has said what it waits for


def test_owners_do_not_learn_from_each_other():
    predictor = Predictor()
    nothing = predictor.wait_s(waiting("search", owner="a"))
    for owner, seconds in (("b", 50.0), ("c", 500.0)):
        learn(predictor, seconds, "search", owner=owner)
        learn(predictor, seconds, owner=owner)
    assert predictor.wait_s(waiting("search", owner="a")) == nothing
    assert predictor.wait_s(waiting(owner="a")) == HUMAN_S
    assert predictor.wait_s(waiting("search", owner="b")) == pytest.approx(50.0)
    assert predictor.wait_s(waiting("search", owner="c")) == pytest.approx(500.0)


def test_humans_are_no_tools():
    predictor = Predictor()
    learn(predictor, 0.5, "shell")
    assert predictor.wait_s(waiting()) == HUMAN_S
    assert predictor.wait_s(waiting(), elapsed_s=1000.0) == 1000.0
    learn(predictor, 20.0)
    assert predictor.wait_s(waiting()) == pytest.approx(20.0)
    assert predictor.wait_s(waiting("another")) == pytest.approx(0.5)
    assert (sum(predictor.waits.tools.seconds.counts), sum(predictor.waits.humans.seconds.counts)) == (40, 40)


def test_parallel_tools_take_as_long_as_the_slowest():
    predictor, rng = Predictor(), random.Random(0)
    for _ in range(500):
        for tool, mean in (("a", 1.0), ("b", 1.0), ("c", 5.0)):
            learn(predictor, rng.expovariate(1 / mean), tool, times=1)
    both = predictor.wait_s(waiting("a", "b", predictor=predictor))
    assert both == pytest.approx(1.5, rel=0.2)  # of two exponential times, 1 + 1/2
    assert predictor.wait_s(waiting("b", "a", predictor=predictor)) == both
    thrice = predictor.wait_s(waiting("a", "a", "a", predictor=predictor))
    assert thrice == pytest.approx(1 + 1 / 2 + 1 / 3, rel=0.2)
    assert predictor.wait_s(waiting("a", "c", predictor=predictor)) == pytest.approx(5.0 + 1 / 6, rel=0.2)
    learn(predictor, 7.0, "a", "b")  # seen together often enough: dependence shows
    assert predictor.wait_s(waiting("b", "a", predictor=predictor)) == pytest.approx(7.0)


def test_many_parallel_tools_are_bounded_in_cost():
    predictor = Predictor()
    names = [f"t{i}" for i in range(MAX_TOOLS)]
    for i, name in enumerate(names):
        learn(predictor, float(i + 1), name)
    program = waiting(*names * 2, predictor=predictor)
    assert len(program.together) <= 64
    assert predictor.wait_s(program) == pytest.approx(MAX_TOOLS, rel=0.1)


@given(st.lists(st.tuples(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 3)), min_size=1))
def test_a_maximum_is_one_of_its_values_and_no_less_than_any_part(parts):
    made = []
    for values, times in parts:
        part = Distribution()
        for value in values:
            part.add(value)
        made.append((part, times))
    largest = maximum(made)
    assert set(largest.values) <= {value for values, _ in parts for value in values}
    levels = (np.arange(len(largest)) + 0.5) / len(largest)
    for part, _ in made:
        assert all(largest.values >= np.quantile(part.values, levels, method="inverted_cdf"))


def test_a_hint_counts_until_it_has_passed():
    predictor = Predictor()
    learn(predictor, 2.0, "shell")
    hinted = waiting("shell", expected_s=30.0)
    assert predictor.knows_wait(hinted)
    assert predictor.wait_s(hinted) == predictor.returns_in(hinted, 0.0) == 30.0
    assert predictor.wait_s(hinted, elapsed_s=10.0) == 20.0
    assert predictor.wait_s(hinted, elapsed_s=30.0) == 30.0  # nothing seen took so long: as much again
    assert predictor.wait_s(waiting(expected_s=5.0)) == 5.0


@pytest.mark.parametrize(
    ("seconds", "taken", "outcome"),
    [
        (None, None, None),
        (0.0, 0.0, "accepted"),
        (12.5, 12.5, "accepted"),
        (3600.0, 3600.0, "accepted"),
        (3600.1, 3600.0, "clipped"),
        (1e300, 3600.0, "clipped"),
        (math.inf, 3600.0, "clipped"),
        (-0.001, None, "ignored"),
        (-math.inf, None, "ignored"),
        (math.nan, None, "ignored"),
    ],
)
def test_absurd_times_are_clipped_or_ignored(seconds, taken, outcome):
    expected = BoundedWait.of(Wait(("t",), expected_s=seconds))
    assert (expected.wait.expected_s, expected.hinted, expected.leased) == (taken, outcome, None)
    kept = BoundedWait.of(Wait((), keep_s=seconds))
    assert (kept.wait.keep_s, kept.leased, kept.hinted) == (taken, outcome, None)


def test_names_of_clients_are_bounded():
    predictor = Predictor()
    learn(predictor, 3.0, "mine", owner="modest")
    for i in range(3 * MAX_TOOLS):
        learn(predictor, 1.0, f"t{i}", owner="greedy", times=1)
    greedy = predictor.waits._owners["greedy"]
    assert list(greedy.by_tools) == [(f"t{i}",) for i in range(2 * MAX_TOOLS, 3 * MAX_TOOLS)]
    assert predictor.wait_s(waiting("mine", owner="modest")) == pytest.approx(3.0)
    for i in range(2 * MAX_KNOWN):
        learn(predictor, 1.0, f"t{i}", owner=i, times=1)
    known = predictor.waits._owners
    assert predictor.waits._size == sum(2 + len(one.by_tools) for one in known.values()) <= MAX_KNOWN
    assert list(known)[-1] == 2 * MAX_KNOWN - 1
