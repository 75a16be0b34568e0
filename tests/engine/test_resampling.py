"""Changed logits, masks and log-probabilities on the device, against NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import resampled
from support.grammars import mask_of
from support.wide import WIDE

from astraea_jax.engine.resampling import ENTRY, adjusted, logprobs, lowerings, mask_words, masked
from astraea_jax.engine.step import Step, StepSizes
from astraea_jax.kernels import Reference
from astraea_jax.kv_cache.offload import NOWHERE
from astraea_jax.models.sharding import abstract_decoder, mesh_of

adjust, mask, report = jax.jit(adjusted), jax.jit(masked), jax.jit(logprobs)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 5, shape).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 1.3, 10.0]))
def test_adjustments_change_their_logits_only(seed, factor):
    rng, logits = np.random.default_rng(seed), normal(seed, 3, 70)
    at = rng.choice(logits.size, 20, replace=False)
    values = rng.normal(0, 3, (20, 3)).astype(np.float32)
    values[:, 1] = factor
    entries = np.full((64, ENTRY), NOWHERE, np.int32)
    entries[:20, 0], entries[:20, 1:] = at, values.view(np.int32)
    expected = resampled.adjusted(logits, entries)
    assert (expected != logits).sum() <= 20
    np.testing.assert_allclose(adjust(logits, entries), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 70, 260])
def test_masks_leave_the_tokens_they_allow(size):
    logits, rng = normal(1, 4, size), np.random.default_rng(size)
    allowed = [rng.choice(size, rng.integers(0, size + 1), replace=False) for _ in range(4)]
    masks = np.zeros((4, mask_words(size)), np.int32)
    for row, tokens in zip(masks, allowed, strict=True):
        mask_of(tokens.tolist(), row)
    masks[0] = -1
    got = np.asarray(mask(logits, masks))
    np.testing.assert_array_equal(got, resampled.masked(logits, masks))
    np.testing.assert_array_equal(got[0], logits[0])
    for row, before, tokens in zip(got[1:], logits[1:], allowed[1:], strict=True):
        assert set(np.flatnonzero(np.isfinite(row))) == set(tokens)
        np.testing.assert_array_equal(row[tokens], before[tokens])


@pytest.mark.parametrize("size", [7, 260])
def test_logprobs_are_those_of_the_softmax(size):
    logits, sampled = normal(2, 5, size), np.array([0, 3, 6, 1, -1], np.int32)
    got, top = np.asarray(report(logits, sampled)), min(20, size)
    expected = resampled.logprobs(logits, sampled)
    assert got.shape == expected.shape == (5, 1 + 2 * top)
    np.testing.assert_array_equal(got[:, 1 + top :], expected[:, 1 + top :])
    values, expected = (x[:, : 1 + top].view(np.float32) for x in (got, expected))
    np.testing.assert_allclose(values[:4], expected[:4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [260, 261])
def test_rows_that_do_not_divide_are_drawn_again_on_several_devices(vocab_size):
    """Whether or not the vocabulary does."""
    rows = 3
    mesh = mesh_of(jax.devices()[:2])
    config = dataclasses.replace(WIDE, vocab_size=vocab_size)
    sizes = StepSizes(16, 4, rows, 16, 8, jnp.dtype("float32"))
    step = Step(abstract_decoder(config, jnp.float32, mesh), Reference(), sizes, mesh)
    shape = step.shapes[0]
    assert step.drawn(shape) == rows
    (_, _, _, _, logits) = step.jitted(shape).lower(*step.arguments(shape)).compile().output_shardings
    assert logits.is_equivalent_to(step.logits(rows).sharding, 2)
    for _, lower in lowerings(step, rows):
        lower().compile()
