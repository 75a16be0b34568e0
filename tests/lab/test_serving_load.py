"""Tests of the arithmetic of a serving benchmark's load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.lab.serving_load import Load, Served, Slo


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(2, 9)), min_size=1, max_size=6), st.integers(1, 4))
def test_the_work_of_a_load_is_what_decoding_it_takes(requests, max_seqs):
    load = Load([[0] * prompt for prompt, _ in requests], [output for _, output in requests])
    read = sum(prompt + made for prompt, output in requests for made in range(1, output))
    assert load.read_tokens() == read
    left, steps = sorted((output - 1 for _, output in requests), reverse=True), 0
    while any(left):  # the longest first is the best order
        left = sorted([n - 1 for n in left[:max_seqs] if n > 1] + left[max_seqs:], reverse=True)
        steps += 1
    assert load.decode_steps(max_seqs) == steps


@given(st.integers(1, 20), st.floats(0, 0.99), st.integers(0, 3))
def test_lengths_stay_within_their_spread(mean, spread, seed):
    load = Load.draw(8, mean, mean + 1, spread, 50, seed)
    assert load == Load.draw(8, mean, mean + 1, spread, 50, seed)
    low, high = round(mean * (1 - spread)), round(mean * (1 + spread))
    assert all(max(1, low) <= len(prompt) <= high for prompt in load.prompts)
    assert all(2 <= output <= round((mean + 1) * (1 + spread)) for output in load.outputs)
    assert all(0 <= token < 50 for prompt in load.prompts for token in prompt)


def test_latencies_of_a_request():
    request = Served(arrived=1.0, tokens=[1.5, 1.6, 1.9], prompt_tokens=3, cached_tokens=0, preemptions=0)
    assert (request.ttft, request.e2e) == pytest.approx((0.5, 0.9))
    assert request.tpot == pytest.approx(0.2)
    assert Slo(0.5, 0.21).met(request)
    assert not Slo(0.49, 0.21).met(request)
    assert not Slo(0.5, 0.19).met(request)
