"""Sampling on the device against NumPy, and the bounds of its parameters."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from astraea_jax.engine.sampling import SamplingParams, likeliest, sample
from astraea_jax.errors import RequestError

draw, jitted_likeliest = jax.jit(sample), jax.jit(likeliest)


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
    """The tokens a row may draw, by sorting; of equally probable ones the first come first."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    if top_k:
        order = order[:top_k]
    p = p / p[order].sum()
    before = np.cumsum(p[order]) - p[order]
    order = order[before < top_p]
    return set(order[p[order] >= min_p * p[order[0]]])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["normal", "ties", "equal", "masked", "huge"]),
    st.floats(0.2, 100),
    st.sampled_from([0, 1, 2, 5, 31, 32, 100, 2**31 - 1]),
    st.sampled_from([1e-9, 0.05, 0.51, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_draws_only_what_the_filters_leave(seed, kind, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, 3, 32)
    if kind == "ties":
        logits = np.round(logits / 3)
    elif kind == "equal":
        logits = np.full(32, logits[0])
    elif kind == "masked":
        logits = np.where(logits < 0.5 * logits.max(), -np.inf, logits)
    elif kind == "huge":
        logits *= 1e36
    logits = logits.astype(np.float32).astype(np.float64)
    tokens = run([logits] * 64, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seeds=seed)
    # One unit of rounding either way decides at the edges of top_p and min_p.
    may = allowed(logits, temperature, top_k, min(top_p * (1 + 1e-5), 1.0), max(min_p - 1e-5, 0))
    assert set(tokens) <= may
    assert np.isfinite(logits[tokens]).all()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from(
        [
            {"temperature": 1e-30},
            {"temperature": 1e-45},
            {"temperature": 1e-38},
            {"temperature": 1e-7},
            {"top_k": 1},
            {"top_p": 1e-9},
            {"top_p": 1e-45},
            {"top_k": 1, "temperature": 100.0},
            {"temperature": 1e-4, "top_k": 5, "top_p": 0.9},
        ]
    ),
)
def test_extremes_that_leave_one_token_are_greedy(seed, ties, extreme):
    logits = np.random.default_rng(seed).normal(0, 30, (8, 50))
    if ties and extreme.get("temperature") != 1e-4:
        logits = np.round(logits / 30)
    np.testing.assert_array_equal(run(logits, seeds=seed, **extreme), logits.argmax(-1))


def test_a_minimum_of_one_leaves_the_most_probable_tokens():
    logits = np.array([1.0, 3.0, 2.0, 3.0])
    assert set(run([logits] * 64, min_p=1.0)) == {1, 3}


def test_every_token_is_reachable_without_filters():
    for temperature in (1.0, 100.0):
        assert len(set(run([np.zeros(32)] * 2048, temperature=temperature, top_k=2**31 - 1))) == 32


def test_filters_keep_the_first_of_equal_tokens():
    logits = np.zeros(32)
    assert set(run([logits] * 512, top_k=3)) == {0, 1, 2}
    assert set(run([logits] * 512, top_p=0.25)) == set(range(8))
    assert set(run([np.array([0.0, 1, 0, 1, 0])] * 512, top_k=3)) == {0, 1, 3}


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


@given(
    arrays(
        np.float32,
        (3, 7),
        elements=st.sampled_from([-np.inf, -3e38, -1.0, -0.0, 0.0, 2.0, 3e38, np.inf]),
    )
)
@settings(deadline=None, max_examples=100)
def test_the_likeliest_is_the_first_of_the_highest(logits):
    np.testing.assert_array_equal(jitted_likeliest(logits), logits.argmax(-1))
    logits[1, 4] = np.nan
    assert jitted_likeliest(logits)[1] == 7


def test_greedy_rows_are_not_disturbed_by_others():
    logits = np.random.default_rng(1).normal(size=(8, 50))
    tokens = run(logits, temperature=np.array([0, 1] * 4))
    np.testing.assert_array_equal(tokens[::2], logits.argmax(-1)[::2])


HUGE = 10**5000  # has no repr: too many digits
BAD = {
    "max_tokens": [0, 2**40, 1.5, True, None, "3", HUGE, np.float32(3)],
    "temperature": [math.nan, math.inf, -1.0, 100.1, "hot", None, True, HUGE, [1.0], 1j, np.timedelta64(1)],
    "top_k": [-1, 2**31, 1.0, None, False],
    "top_p": [math.nan, 0, 0.0, 1.1, None, np.timedelta64(1)],
    "min_p": [-math.inf, -0.1, 1.1, "0"],
    "seed": [-1, 2**32, 1.0, "1", True],
    "stop": [
        ("",),
        ("x",) * 17,
        "",
        b"x",
        [b"x"],
        [1],
        [None],
        3,
        {"x": 1},
        "x" * 257,
        "\ud800",
        (["x"],),
        iter(int, 1),
    ],
    "stop_token_ids": [(-1,), (2**31,), (1.0,), (True,), ("1",), 3, "12", ([2, 0],), [None], range(17), np.array(3)],
    "ignore_eos": [None, 1, "false", np.bool_(True)],
    "presence_penalty": [math.nan, -2.1, 2.1, None, "1", True, HUGE],
    "frequency_penalty": [math.inf, -2.1, 2.1, None, "1", False],
    "repetition_penalty": [0, 0.0, 1e-320, 1e-30, 0.0099, -1.0, math.nan, math.inf, 10.1, None, True],
    "min_tokens": [-1, 257, 1.0, None, True, HUGE],
    "logit_bias": [
        {1: 101},
        {1: -101},
        {1: math.nan},
        {1: None},
        {1: True},
        {"1": 1.0},
        {1.0: 1.0},
        {-1: 1.0},
        {2**31: 1.0},
        dict.fromkeys(range(301), 1.0),
        [(1, 1.0), (1, 2.0)],
        [1, 2],
        [(1, 2, 3)],
        ["12"],
        "12",
        3,
    ],
    "logprobs": [-1, 21, 1.0, "1", True, HUGE],
    "grammar": ["{}", {}, 3, object()],
}


@pytest.mark.parametrize("field", BAD)
def test_bad_values_are_named(field):
    for value in BAD[field]:
        with pytest.raises(RequestError, match=field) as caught:
            SamplingParams(**{field: value})
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("stop", "</a>", ("</a>",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("stop_token_ids", [1, np.int64(2)], (1, 2)),
        ("stop_token_ids", np.array([1, 2]), (1, 2)),
        ("stop_token_ids", frozenset({2**31 - 1}), (2**31 - 1,)),
        ("stop_token_ids", None, ()),
        ("max_tokens", np.int32(3), 3),
        ("temperature", 1, 1.0),
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", 1e-320, 1e-320),
        ("seed", np.uint32(2**32 - 1), 2**32 - 1),
        ("seed", None, None),
        ("presence_penalty", -2, -2.0),
        ("frequency_penalty", np.float32(2), 2.0),
        ("repetition_penalty", 10, 10.0),
        ("repetition_penalty", 0.01, 0.01),
        ("min_tokens", np.int64(256), 256),
        ("logit_bias", {3: -100, np.int64(0): np.float32(0.5)}, ((3, -100.0), (0, 0.5))),
        ("logit_bias", [[2**31 - 1, 100]], ((2**31 - 1, 100.0),)),
        ("logit_bias", None, ()),
        ("logprobs", 0, 0),
        ("logprobs", np.int64(20), 20),
        ("logprobs", None, None),
    ],
)
def test_values_are_converted_when_parameters_are_made(field, value, kept):
    params = SamplingParams(**{field: value})
    assert getattr(params, field) == kept
    assert type(getattr(params, field)) is type(kept)
    assert hash(params) == hash(SamplingParams(**{field: kept}))


def test_a_list_given_as_stops_can_change_afterwards():
    stops = ["a"]
    params = SamplingParams(stop=stops)
    stops.append("b")
    assert params.stop == ("a",)


def test_seeds_are_drawn_once_and_only_if_none_is_given():
    given = SamplingParams(seed=0)
    assert given.seeded() is given
    drawn = {SamplingParams(temperature=0.5).seeded() for _ in range(20)}
    assert len({params.seed for params in drawn}) > 10
    assert all(params.seeded() is params and params.temperature == 0.5 for params in drawn)


async def test_requests_without_a_seed_draw_afresh(engine):
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
    answers = {await engine.generate([1, 2, 3], params).text() for _ in range(6)}
    assert len(answers) > 1
