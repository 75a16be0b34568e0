"""Our own TPU kernels, interpreted, against the reference over random ragged batches, with everything unused poisoned.

TPU interpret mode of JAX: memory that nobody has written is NaN, and two accesses without an order are a race.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the only way to ask for the races found
from jax.experimental.pallas import tpu as pltpu
from support.sizes import SMALL

from astraea_jax.errors import StartupError
from astraea_jax.kernels.backend import Batch
from astraea_jax.kernels.pallas_tpu import PallasTPU, check_page_table
from astraea_jax.kernels.reference import Reference
from astraea_jax.sampling import SamplingParams

ROWS, WIDTH, SIZE = 4, 4, 8
CONTEXT = WIDTH * SIZE
POISONED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
SHAPES = [(2, 4, 64, "bfloat16"), (1, 8, 16, "float32"), (2, 1, 256, "float32")]
"""K, G, H and the dtype: of its own lanes or shared ones, one query a head or many."""
reference = jax.jit(Reference().attend, static_argnames="q_tile")
own = jax.jit(PallasTPU(POISONED).attend, static_argnames="q_tile")


@st.composite
def batches(draw):
    """Tokens T, and of each row its queries and the context before them; rows without a query come last in decode."""
    decode = draw(st.booleans())
    edges = st.sampled_from([0, 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, CONTEXT - 5])
    q_lens = draw(st.lists(st.sampled_from([0, 1] if decode else [0, 1, 3, 5]), min_size=ROWS, max_size=ROWS))
    if decode:
        q_lens.sort(reverse=True)
    return ROWS if decode else 20, q_lens, [draw(edges) if n else 0 for n in q_lens], draw(st.integers(0, 2**32 - 1))


def to_lanes(pages: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pages ``[P, 2, K, S, H]`` in the form of the kernels, NaN in the padding."""
    h, lanes = pages.shape[-1], shape[-1]
    room = lanes // (3 - shape[0]) - h
    wide = np.pad(pages, [(0, 0)] * 4 + [(0, room)])
    return wide if shape[0] == 2 else np.concatenate([wide[:, :1], wide[:, 1:]], axis=-1)


def from_lanes(pages: np.ndarray, h: int) -> np.ndarray:
    half = pages.shape[-1] // 2
    return pages[..., :h] if pages.shape[1] == 2 else np.stack([pages[:, 0, ..., :h], pages[:, 0, ..., half:half + h]], 1)


@pytest.mark.parametrize(("kv_heads", "group", "head", "dtype"), SHAPES)
@settings(deadline=None, max_examples=8)
@given(batch=batches())
def test_matches_the_reference(kv_heads, group, head, dtype, batch):
    tokens, q_lens, past, seed = batch
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=(tokens, n, head)), dtype) for n in (kv_heads * group, kv_heads, kv_heads)
    )
    table = rng.permutation(np.arange(1, ROWS * WIDTH + 1)).reshape(ROWS, WIDTH).astype(np.int32)
    lens = np.array(q_lens, np.int32) + np.array(past, np.int32)
    cu = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    pages = np.full((ROWS * WIDTH + 1, 2, kv_heads, SIZE, head), np.nan, np.float32)
    slots = np.zeros(tokens, np.int32)
    for r in range(ROWS):
        for at in range(past[r]):
            pages[table[r, at // SIZE], :, :, at % SIZE] = rng.normal(size=(2, kv_heads, head))
        for i in range(q_lens[r]):
            slots[cu[r] + i] = table[r, (past[r] + i) // SIZE] * SIZE + (past[r] + i) % SIZE
        table[r, -(-lens[r] // SIZE):] = rng.integers(2**30)  # what lies beyond a context may be any number
    where = Batch(*map(jnp.asarray, (table, lens, cu, slots)))
    q_tile = 1 if tokens == ROWS else 4

    shape = PallasTPU().page_shape(kv_heads, SIZE, head, dtype)
    out, written = own(q, k, v, jnp.asarray(to_lanes(pages, shape), dtype), where, q_tile=q_tile)
    expected, kept = reference(q, k, v, jnp.asarray(pages, dtype), where, q_tile=q_tile)

    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(out[: cu[-1]], expected[: cu[-1]], rtol=tolerance, atol=tolerance)
    assert (out[cu[-1]:] == 0).all()
    written = from_lanes(np.asarray(written, np.float32), head)
    np.testing.assert_array_equal(written[1:], np.asarray(kept, np.float32)[1:])  # all pages but the scrap
    assert not interpret_pallas_call.races.races_found


async def test_serves_the_same_tokens(make_engine, greedy):
    engine = make_engine(dataclasses.replace(SMALL, attention="pallas-interpreted", max_step_tokens=8))
    prompt = list(range(40, 63))
    generation = engine.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True))
    assert [token async for delta in generation for token in delta.token_ids] == greedy(prompt, 6)


def test_a_page_table_beyond_scalar_memory_is_refused():
    wide = jnp.zeros((64, 4096), jnp.int32)
    with pytest.raises(StartupError, match="raise page_size"):
        check_page_table(Batch(wide, wide[:, 0], wide[0, :65], wide[0]))
