"""Tests of distributions against the values that made them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.scheduler.distribution import Distribution


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60), st.floats(0, 120))
def test_distributions_are_those_of_their_values(values, elapsed):
    known = Distribution()
    for value in values:
        known.add(value)
    assert known.values == sorted(values)
    assert known.mean(0) == pytest.approx(np.mean(values))
    beyond = [v for v in values if v > elapsed]
    expected = np.mean(beyond) - elapsed if beyond else max(elapsed, 1.0)
    assert known.mean_beyond(elapsed, 1.0) == pytest.approx(expected, abs=1e-9)


def test_distributions_forget():
    known = Distribution()
    for i in range(5000):
        known.add(i)
    assert len(known) == 1024
    assert known.values[0] == 5000 - 1024
