"""The reference attention against a few lines of NumPy, over random ragged batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import naive

from astraea_jax.kernels.reference import attention, write_kv

TOKENS, ROWS, HEAD = 64, 8, 16
attend = jax.jit(attention, static_argnames="q_tile")


@st.composite
def batches(draw):
    """Rows of 0, 1 or many queries on contexts around page edges, in pools whose unused pages hold garbage."""
    size = draw(st.sampled_from([1, 4, 16]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 8), (4, 1)]))
    decode = draw(st.booleans())
    edges = st.sampled_from([0, 1, size - 1, size, size + 1, 40])
    q_lens = [draw(st.integers(0, 1)) if decode else draw(st.sampled_from([0, 1, 3, 16, 17])) for _ in range(ROWS)]
    while sum(q_lens) > TOKENS:
        q_lens[int(np.argmax(q_lens))] = 1
    if decode:  # rows without a query come last, as the runner lays them out
        q_lens.sort(reverse=True)
    past = [draw(edges) if n else 0 for n in q_lens]
    return size, kv_heads, group, q_lens, past, draw(st.integers(0, 2**32 - 1))


@settings(deadline=None, max_examples=60)
@given(batches())
def test_matches_numpy(batch):
    size, kv_heads, group, q_lens, past, seed = batch
    rng = np.random.default_rng(seed)
    width = -(-60 // size)
    num_pages = ROWS * width + 1
    pages = rng.normal(size=(num_pages, 2, kv_heads, size, HEAD)).astype(np.float32)
    table = rng.permutation(np.arange(1, num_pages)).reshape(ROWS, width).astype(np.int32)
    kv_lens = np.array(q_lens, np.int32) + np.array(past, np.int32)
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    decode = max(q_lens) <= 1
    q = rng.normal(size=(ROWS if decode else TOKENS, kv_heads * group, HEAD)).astype(np.float32)
    expected = naive(q, pages, table, kv_lens, cu)
    pages[0] = np.nan  # the scrap page may hold anything
    for r in range(ROWS):
        pages[table[r, -(-kv_lens[r] // size) :]] = np.nan  # and so may pages beyond a context
    out = np.asarray(attend(q, pages, table, kv_lens, cu, q_tile=1 if decode else 16))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


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
