"""Tests that metadata arrive as they were sent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.rpc.metadata import read_sampling, write_sampling


@given(
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    seed=st.none() | st.integers(0, 2**32 - 1),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=3),
    ignore_eos=st.booleans(),
)
def test_sampling_survives_the_way(temperature, top_k, seed, stop, ignore_eos):
    params = SamplingParams(7, temperature, top_k, seed=seed, stop=tuple(stop), ignore_eos=ignore_eos)
    assert read_sampling(write_sampling(params), 7) == params


def test_no_metadata_is_no_seed():
    assert read_sampling([], 7) == SamplingParams(max_tokens=7)
