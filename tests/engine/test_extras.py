"""What a request needs beyond plain sampling, followed token by token: against the formulas, written down naively."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.grammars import BROKEN, EVEN, Broken, Spelled
from support.resampled import adjusted

from astraea_jax.engine.extras import FORBIDDEN, Adjustments, Collector, GrammarFault, Tracker
from astraea_jax.engine.sampling import SamplingParams

V = 40
BYTES = 256
TOKENS = st.integers(0, V - 1)


def expected(logits, params, prompt, output, stops):
    """Biases first, then penalties, as in vLLM's sampler."""
    logits = logits.astype(np.float64)
    for token, bias in params.logit_bias:
        logits[token] += bias
    if len(output) < params.min_tokens:
        logits[[token for token in stops if token < V]] = -np.inf
    for token in {*prompt, *output}:
        by = params.repetition_penalty
        logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
    for token in set(output):
        logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return logits


@settings(deadline=None, max_examples=150)
@given(
    st.lists(TOKENS, min_size=1, max_size=60),
    st.lists(TOKENS, max_size=60),
    st.frozensets(st.integers(0, V + 5), max_size=3),
    st.builds(
        SamplingParams,
        presence_penalty=st.sampled_from([0.0, -2.0, 1.5]),
        frequency_penalty=st.sampled_from([0.0, -0.1, 2.0]),
        repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
        min_tokens=st.sampled_from([0, 1, 5, 30]),
        logit_bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, 0.0, 2.5, 100.0]), max_size=4),
    ),
)
def test_logits_are_those_of_the_formulas(prompt, output, stops, params):
    adjustments = Adjustments(params, prompt, stops, V)
    logits = np.random.default_rng(len(prompt)).normal(0, 3, (2, V)).astype(np.float32)
    for n in range(len(output) + 1):
        entries = adjustments.entries(1)
        assert len({*entries[:, 0]}) == len(entries), "a logit has two adjustments"
        want = expected(logits[1], params, prompt, output[:n], stops)
        if not adjustments.active:
            np.testing.assert_array_equal(want, logits[1])
        if n in (0, 1, 4, 5, len(output)):
            got = adjusted(logits, entries)
            np.testing.assert_array_equal(got[0], logits[0])
            got = np.where(got[1] < FORBIDDEN / 100, -np.inf, got[1])
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        if n < len(output):
            adjustments.push(output[n])


@pytest.mark.parametrize("call", BROKEN)
def test_a_grammar_that_does_not_work_is_told_as_such(call):
    def follow() -> None:
        tracker = Tracker(SamplingParams(grammar=Broken(call)), [1], frozenset(), BYTES)
        for _ in range(5):
            Collector(BYTES).add(0, tracker)
            tracker.push(2)

    with pytest.raises(GrammarFault, match="grammar"):
        follow()


def test_a_row_whose_grammar_fails_leaves_nothing_behind():
    collector, params = Collector(BYTES), SamplingParams(grammar=Broken("fill", 0), logit_bias={1: 1}, logprobs=1)
    with pytest.raises(GrammarFault):
        collector.add(0, Tracker(params, [1], frozenset(), BYTES))
    assert collector.collected() is None


def test_rows_are_collected_with_what_they_need_and_no_more():
    collector = Collector(BYTES)
    stops = frozenset({3})
    for row, params in enumerate(
        [
            SamplingParams(logprobs=0),
            SamplingParams(grammar=EVEN, logit_bias={5: 1.0}),
            SamplingParams(min_tokens=1),
            SamplingParams(grammar=Spelled((7, 8))),
        ]
    ):
        collector.add(row, Tracker(params, [1], stops, BYTES))
    extras = collector.collected()
    assert (extras.rows, extras.masked, extras.logprobs) == ([1, 2, 3], [1, 3], True)
    assert sorted(extras.entries[:, 0].tolist()) == [BYTES + 5, 2 * BYTES + 3]
    assert extras.masks.shape == (2, 8)
    assert extras.masks[1].tolist() == [1 << 7, *[0] * 7]


def test_a_minimum_that_is_reached_costs_nothing_more():
    tracker = Tracker(SamplingParams(min_tokens=2), [1], frozenset({3}), BYTES)
    assert tracker.adjustments.active
    tracker.push(1)
    tracker.push(2)
    collector = Collector(BYTES)
    collector.add(0, tracker)
    assert collector.collected() is None
