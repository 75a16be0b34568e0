"""Tests of the chance that jobs end, against the lengths of those that made it."""

from __future__ import annotations

import numpy as np
import pytest

from astraea_jax.scheduler.hazards import TurnHazards


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
    late._make_tables()
    known = learn(lengths)
    known._make_tables()
    assert [late.index(turn) for turn in range(9)] == [known.index(turn) for turn in range(9)]
