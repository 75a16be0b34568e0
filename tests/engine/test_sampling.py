"""Sampling on the device against NumPy, and the bounds of its parameters."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astraea_jax.engine.sampling import SamplingParams, sample
from astraea_jax.errors import RequestError

draw = jax.jit(sample)


def run(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=0, positions=None):
    rows = len(logits)
    full = lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), rows)  # noqa: E731
    positions = np.arange(rows) if positions is None else positions
    return np.asarray(
        draw(
            np.asarray(logits, np.float32),
            full(temperature, np.float32),
            full(top_k, np.int32),
            full(top_p, np.float32),
            full(min_p, np.float32),
            full(seeds, np.uint32),
            full(positions, np.int32),
        )
    )


def allowed(logits, temperature, top_k, top_p, min_p):
    """The tokens a row may draw, by sorting."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p)
    if top_k:
        order = order[:top_k]
    p = p / p[order].sum()
    before = np.cumsum(p[order]) - p[order]
    order = order[before < top_p]
    return set(order[p[order] >= min_p * p[order[0]]])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.floats(0.2, 3),
    st.sampled_from([0, 1, 2, 5, 31, 32, 100]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.9]),
)
def test_draws_only_what_the_filters_leave(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, 3, 32).astype(np.float32)
    tokens = run([logits] * 64, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seed)
    # One unit of rounding either way decides ties at the edge of top_p.
    assert set(tokens) <= allowed(logits, temperature, top_k, min(top_p + 1e-5, 1.0), max(min_p - 1e-5, 0))


def test_frequencies_follow_the_probabilities():
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    tokens = np.concatenate([run([logits] * 512, seeds=seed) for seed in range(16)])
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / tokens.size, np.exp(logits), atol=0.02)


def test_filters_leave_every_allowed_token_reachable():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert set(run([logits] * 512, top_p=0.6)) == {0, 1}
    assert set(run([logits] * 512, top_k=3)) == {0, 1, 2}
    assert set(run([logits] * 512, min_p=0.3)) == {0, 1, 2}


def test_a_draw_depends_on_seed_and_position_only():
    logits = np.random.default_rng(0).normal(size=(4, 100))
    alone = [run(logits[i : i + 1], seeds=7, positions=[10 + i])[0] for i in range(4)]
    together = run(logits, seeds=7, positions=[10, 11, 12, 13])
    assert alone == together.tolist()
    assert run([logits[0]] * 64, seeds=np.arange(64), positions=[5] * 64).std() > 0


def test_greedy_rows_are_not_disturbed_by_others():
    logits = np.random.default_rng(1).normal(size=(8, 50))
    tokens = run(logits, temperature=np.array([0, 1] * 4))
    np.testing.assert_array_equal(tokens[::2], logits.argmax(-1)[::2])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2**40),
        ("max_tokens", 1.5),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -1.0),
        ("top_p", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -math.inf),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("temperature", "hot"),
        ("max_tokens", True),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})
