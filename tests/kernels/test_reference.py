"""The reference attention against a few lines of NumPy, over random ragged batches."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from support.ragged import VARIANTS, ragged

from astraea_jax.kernels import Reference
from astraea_jax.kernels.reference import attention, write_kv

HEAD = 16
attend = jax.jit(partial(attention, scale=HEAD**-0.5), static_argnames="q_tile")


@pytest.mark.serves(
    "reference", "tested", "prefill and decode in one step", "grouped queries, any ratio", "windows", "score caps"
)
@settings(deadline=None, max_examples=30)
@given(case=ragged(), variant=VARIANTS)
def test_matches_numpy(case, variant):
    case = case.switched(*variant).behind(variant[0].window)
    case.check(case.attend(Reference()), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.serves("reference", "tested", "bfloat16")
def test_bfloat16_pages_keep_two_digits():
    rng = np.random.default_rng(0)
    pages = rng.normal(size=(9, 2, 2, 16, HEAD)).astype(np.float32)
    q = rng.normal(size=(8, 4, HEAD)).astype(np.float32)
    table = np.arange(1, 9, dtype=np.int32)[:, None]
    lens, cu = np.full(8, 16, np.int32), np.arange(9, dtype=np.int32)
    exact = attend(q, pages, table, lens, cu, q_tile=1)
    rounded = attend(q.astype("bfloat16"), pages.astype("bfloat16"), table, lens, cu, q_tile=1)
    assert rounded.dtype == "bfloat16"
    np.testing.assert_allclose(np.asarray(rounded, np.float32), exact, rtol=2e-2, atol=2e-2)


def test_written_keys_and_values_are_apart_at_their_slots():
    k, v = np.ones((2, 2, HEAD), np.float32), 2 * np.ones((2, 2, HEAD), np.float32)
    k[:, 1] = 3
    pages = np.asarray(write_kv(jnp.zeros((3, 2, 2, 4, HEAD)), k, v, jnp.array([5, 10])))
    for page, offset in ((1, 1), (2, 2)):
        assert (pages[page, 0, :, offset] == [[1], [3]]).all()
        assert (pages[page, 1, :, offset] == 2).all()
    assert pages.sum() == 2 * pages[1, :, :, 1].sum()


@pytest.mark.serves("reference", "tested", "fp8 KV")
def test_float8_pages_clip_what_they_cannot_hold_and_are_read_as_written():
    """Pages as whole numbers of the same bits, which is how the backend keeps them, and as float8."""
    k = jnp.array([1e4, -500.0, 448.0, 0.3, 2.0**-9, 0.0, -3.3, 17.0], jnp.float32).repeat(2).reshape(1, 1, 16)
    kept = np.array([448, -448, 448, 0.3125, 2.0**-9, 0, -3.25, 16], np.float32).repeat(2)
    table, lens, cu = jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.array([0, 1])
    for dtype in (Reference().page_dtype("float8_e4m3fn"), jnp.dtype("float8_e4m3fn")):
        assert dtype.itemsize == 1
        pages = write_kv(jnp.zeros((2, 2, 1, 4, HEAD), dtype), k, k, jnp.array([4]))
        np.testing.assert_array_equal(attend(k, pages, table, lens, cu, q_tile=1)[0, 0], kept)
    nan = write_kv(jnp.zeros((2, 2, 1, 4, HEAD), dtype), k, k * jnp.nan, jnp.array([4]))
    assert jnp.isnan(attend(k, nan, table, lens, cu, q_tile=1)).all()
