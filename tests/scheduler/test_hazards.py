"""Tests of the chance that jobs end, against the lengths of those that made it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astraea_jax.scheduler.hazards import TurnHazards

seen_requests = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3), st.booleans()), min_size=1, max_size=80)
"""Number and kind of each request that has ended, and whether it was the last of its job."""


def learn(lengths) -> TurnHazards:
    hazards = TurnHazards()
    for n in lengths:
        for turn in range(n):
            hazards.observe(turn, last=turn == n - 1)
    return hazards


def test_fixed_lengths_reward_progress_and_heavy_tails_do_not():
    rng = np.random.default_rng(0)
    fixed = learn([10] * 500)
    assert fixed.remaining(0) > fixed.remaining(4) > fixed.remaining(8)
    assert fixed.remaining(0) == pytest.approx(10, rel=0.25)
    geometric = learn(rng.geometric(0.1, 3000))
    assert geometric.remaining(0) == pytest.approx(10, rel=0.15)
    assert geometric.remaining(12) == pytest.approx(10, rel=0.2)
    heavy = learn([1] * 900 + [200] * 100)
    assert heavy.index(0) < heavy.index(20)  # a newcomer is worth a try, who has stayed is not


def test_programs_that_live_on_count():
    hazards = TurnHazards()
    for _ in range(300):  # three hundred have gone ten requests, only thirty have ended
        for turn in range(10):
            hazards.observe(turn, last=False)
    for _ in range(30):
        hazards.observe(0, last=True)
    assert hazards.remaining(5) > 20


def test_an_end_that_is_learned_late_counts_as_one_that_was_known():
    lengths = [1, 3, 3, 7] * 40
    late = TurnHazards()
    for n in lengths:
        for turn in range(n):
            late.observe(turn, last=False)
        late.ended(n - 1)
    late._estimate()
    known = learn(lengths)
    known._estimate()
    assert [late.index(turn) for turn in range(9)] == [known.index(turn) for turn in range(9)]


def test_an_end_that_is_learned_late_tells_as_much_of_what_jobs_output():
    known, late = TurnHazards(), TurnHazards()
    for talk in (-0.7, 0.4, 0.9):
        known.observe(2, talk=talk, last=True)
        late.observe(2, talk=talk, last=False)
        late.ended(2, talk=talk)
    assert late._slope == known._slope > 0.0


def test_what_jobs_output_tells_how_long_they_go_on():
    rng = np.random.default_rng(0)
    hazards, silent = TurnHazards(), TurnHazards()
    for talk in rng.uniform(-1, 1, 400):
        length = rng.geometric(0.1 * np.exp(1.5 * talk))
        for turn in range(length):
            hazards.observe(turn, talk=talk, last=turn == length - 1)
            silent.observe(turn, talk=rng.uniform(-1, 1), last=turn == length - 1)
    assert hazards._slope == pytest.approx(1.5, abs=0.3)
    little, much = (hazards.index(3, talk=talk) for talk in (-1.0, 1.0))
    assert little > 6 * much  # in truth 20 times
    assert silent._slope == pytest.approx(0.0, abs=0.3)  # talk that says nothing is not listened to
    assert hazards.index(3, talk=50.0) == hazards.index(3, talk=TurnHazards.FARTHEST)


@settings(max_examples=30)
@given(seen=seen_requests, talks=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_whatever_jobs_output_the_answers_are_numbers(seen, talks):
    hazards = TurnHazards()
    for number, (turn, kind, last) in enumerate(seen * 3):
        hazards.observe(turn, kind, talks[number % len(talks)], last=last)
    hazards._estimate()
    for turn, kind, _ in seen[:10]:
        for talk in talks:
            assert 1.0 <= hazards.index(turn, kind, talk) < 1e9
            assert 1.0 <= hazards.remaining(turn, kind, talk) < 1e9


@settings(max_examples=30)
@given(seen=seen_requests)
def test_estimates_are_those_of_the_definition(seen):
    hazards = TurnHazards()
    counts = np.zeros((2, TurnHazards.KINDS, TurnHazards.LONGEST))  # at risk, ended
    for turn, kind, last in seen:
        hazards.observe(turn, kind, last=last)
        for row in {0, kind}:
            counts[:, row, min(turn, TurnHazards.LONGEST - 1)] += 1, last
    hazards._estimate()
    expected, mean = defined_hazards(counts[0], counts[1], sum(last for *_, last in seen), len(seen))
    for turn, kind, _ in seen[:10]:
        at = min(turn, TurnHazards.LONGEST - 1)
        alive, run, costs = 1.0, 0.0, []
        for hazard in expected[kind, at : at + TurnHazards.HORIZON]:
            run, alive = run + alive, alive * (1 - hazard)
            costs.append(run / (1 - alive))
        assert hazards.index(turn, kind) == pytest.approx(min(costs))
        left = 1 / mean
        for hazard in expected[kind, at : TurnHazards.LONGEST][::-1]:
            left = 1 + (1 - hazard) * left
        assert hazards.remaining(turn, kind) == pytest.approx(left)


def defined_hazards(risk, ends, all_ends, requests):
    """Chances to end by kind and turn, with the overall mean after them; smoothed and drawn to what is more certain."""
    turns = np.arange(TurnHazards.LONGEST)
    kernel = np.exp(-np.abs(turns[:, None] - turns) / TurnHazards.WIDTH)
    mean = (all_ends + TurnHazards.FEWEST_ENDS) / (requests + TurnHazards.FEWEST_TURNS)
    risk, ends = risk @ kernel, ends @ kernel
    all_kinds = (ends[0] + TurnHazards.PRIOR * mean) / (risk[0] + TurnHazards.PRIOR)
    by_kind = (ends + TurnHazards.KIN * all_kinds) / (risk + TurnHazards.KIN)
    by_kind[0] = all_kinds
    after = np.full((TurnHazards.KINDS, TurnHazards.HORIZON), mean)
    return np.concatenate([np.clip(by_kind, 1e-3, 1.0), after], axis=1), mean


def test_one_who_makes_output_tell_everything_leaves_others_an_index():
    """Requests of talk 0 that go on, and ends at a little more: the likeliest slope has no bound."""
    hazards = TurnHazards()
    for number in range(20_000):
        last = number % 40 == 0
        hazards.observe(3, talk=0.1 if last else 0.0, last=last)
    assert hazards._slope == hazards.STEEPEST
    assert 1.0 < hazards.index(3, talk=-2.0) < 1e6
    assert hazards.index(3, talk=2.0) >= 1.0
