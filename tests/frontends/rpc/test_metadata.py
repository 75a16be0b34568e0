"""Tests that metadata arrive as they were sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.engine.generation import Usage
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import RequestError
from astraea_jax.frontends.rpc.metadata import (
    Constraint,
    read_constraint,
    read_sampling,
    read_usage,
    write_sampling,
    write_usage,
)
from astraea_jax.scheduler.wait import Resumed, WaitOutcome


@given(
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.none() | st.integers(0, 2**32 - 1),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=3),
    ignore_eos=st.booleans(),
    more=st.fixed_dictionaries(
        {},
        optional={
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "repetition_penalty": st.floats(0.1, 10),
            "min_tokens": st.integers(0, 7),
            "logprobs": st.none() | st.integers(0, 20),
            "logit_bias": st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=300),
        },
    ),
)
def test_sampling_survives_the_way(temperature, top_k, seed, stop, ignore_eos, more):
    params = SamplingParams(7, temperature, top_k, seed=seed, stop=tuple(stop), ignore_eos=ignore_eos, **more)
    assert read_sampling(write_sampling(params), 7) == params


OUTCOMES = st.none() | st.sampled_from(["accepted", "clipped", "ignored"])
SECONDS = st.floats(0, 1e9)
COUNTS = st.integers(0, 10**9)


WAITS = st.builds(WaitOutcome, SECONDS, SECONDS, st.none() | st.sampled_from(["tool", "human"]), OUTCOMES, OUTCOMES)
RESUMED = st.builds(
    Resumed, st.sampled_from(["new", "recomputed"]), st.sampled_from(["", "prefix differs"]), COUNTS, COUNTS, COUNTS
)


@given(
    st.builds(Usage, COUNTS, COUNTS, COUNTS, SECONDS, SECONDS, SECONDS, COUNTS, wait=st.none() | WAITS, resumed=RESUMED)
)
def test_usage_survives_the_way(usage):
    assert read_usage(write_usage(usage, "stop")) == (usage, "stop")


def test_a_server_that_says_less_of_usage_is_understood():
    usage = Usage(3, 2, 1, 0.5, 0.5, 0.5, 0)
    written = [pair for pair in write_usage(usage, "stop") if "resumed" not in pair[0]]
    assert read_usage(written) == (usage, "stop")
    assert read_usage([("x-finish-reason", "stop")]) == (None, "stop")


def test_no_metadata_is_no_seed():
    assert read_sampling([], 7) == SamplingParams(max_tokens=7)


@pytest.mark.parametrize(
    "text",
    ["", ":", "1", "1:", ":1", "1:2:3", "1:x", "x:1", "1:nan", "1:101", "-1:1", "1:1,1:1", ",".join(["1:1"] * 301)],
)
def test_biases_that_cannot_be_are_refused(text):
    with pytest.raises(RequestError, match=r"logit[-_]bias"):
        read_sampling([("x-logit-bias", text)], 7)


def test_one_constraint_may_come_in_either_form():
    assert read_constraint([("x-temperature", "1")]) is None
    assert read_constraint([("x-regex", "a+")]) == Constraint("regex", "a+")
    assert read_constraint([("x-grammar-bin", 'start: "é"'.encode())]) == Constraint("lark", 'start: "é"')
    for two in (("x-json-schema", "{}"), ("x-regex-bin", b"a")):
        with pytest.raises(RequestError, match="only one"):
            read_constraint([("x-regex", "a+"), two])
