"""Our own TPU kernels, interpreted, against NumPy over random ragged batches, with everything unused poisoned.

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
from support.ragged import Ragged
from support.sizes import SMALL

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import StartupError
from astraea_jax.kernels.backend import Batch
from astraea_jax.kernels.pallas_tpu import PallasTPU, check_page_table
from astraea_jax.models.heads import PLAIN, Switches

ROWS, SIZE, LONGEST = 4, 8, 32
POISONED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
seeds = st.integers(0, 2**32 - 1)
own = jax.jit(PallasTPU(POISONED).attend, static_argnames="q_tile")


def lengths(decode: bool) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Return each row's queries and the context before them; in decode, rows without a query come last."""
    past = st.sampled_from([0, 1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE, LONGEST - 5])
    rows = st.lists(st.tuples(st.sampled_from([0, 1] if decode else [0, 1, 3, 5]), past), min_size=ROWS, max_size=ROWS)
    return rows.map(lambda drawn: sorted(drawn, key=lambda row: -row[0]) if decode else drawn)


def to_lanes(pages: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pages ``[P, 2, K, S, H]`` in the form of the kernels."""
    room = shape[-1] // (3 - shape[0]) - pages.shape[-1]
    wide = np.pad(pages, [(0, 0)] * 4 + [(0, room)])
    return wide if shape[0] == 2 else np.concatenate([wide[:, :1], wide[:, 1:]], axis=-1)


@pytest.mark.serves("pallas", "interpreted", "prefill and decode in one step", "grouped queries, any ratio", "bfloat16")
@pytest.mark.serves("pallas", "interpreted", "fp8 KV", "windows", "sinks", "score caps")
@pytest.mark.parametrize(
    ("decode", "kv_heads", "group", "head", "dtype", "kv_dtype", "switches", "sinks"),
    [
        (True, 1, 8, 128, "float32", "float32", Switches(window=SIZE + 3, scale=0.3, soft_cap=2.0), True),
        (True, 2, 4, 64, "bfloat16", "bfloat16", PLAIN, True),  # a key and a value share the lanes
        (True, 2, 2, 64, "bfloat16", "float8_e4m3fn", Switches(window=3), False),
        (False, 2, 1, 128, "float32", "float32", PLAIN, False),
        (False, 2, 4, 64, "float32", "float32", Switches(window=SIZE, scale=0.2, soft_cap=3.0), True),
        (False, 1, 4, 16, "bfloat16", "bfloat16", Switches(window=1), False),
    ],
)
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_attends_and_writes_in_ragged_batches(decode, kv_heads, group, head, dtype, kv_dtype, switches, sinks, data):
    q_lens, past = np.array(data.draw(lengths(decode))).T
    past = np.where(q_lens > 0, past, 0)
    case = Ragged.make(SIZE, kv_heads, group, head, q_lens.tolist(), past.tolist(), data.draw(seeds), LONGEST)
    dtypes = {"q": dtype, "k": kv_dtype, "v": kv_dtype, "pages": kv_dtype}
    rounded = {name: getattr(case, name).astype(of_it).astype(np.float32) for name, of_it in dtypes.items()}
    case = dataclasses.replace(case, **rounded)
    case = case.switched(switches, sinks).behind(switches.window)
    expected, written = case.expected()
    table = case.batch.page_table.copy()
    for row, length in zip(table, case.batch.kv_lens):
        row[-(-length // SIZE) :] = 2**30  # what lies beyond a context may be any number

    shape = PallasTPU().page_shape(kv_heads, SIZE, head, kv_dtype)
    pages = jnp.asarray(to_lanes(case.pages, shape), kv_dtype)
    out, result = own(case.heads(dtype), pages, case.batch._replace(page_table=table), q_tile=1 if decode else 4)

    tolerance = 1e-4 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(np.asarray(result, np.float32)[1:], to_lanes(written, shape)[1:])
    assert not interpret_pallas_call.races.races_found


@pytest.mark.serves("pallas", "interpreted", "the engine's tokens, against dense attention", "layers in one loop")
async def test_serves_the_same_tokens(make_engine, greedy):
    """In a loop over the layers, as on a TPU."""
    config = dataclasses.replace(SMALL, attention="pallas-interpreted", max_seqs=2, max_step_tokens=8, scan_layers=True)
    engine = make_engine(config)
    prompt = list(range(40, 63))
    generation = engine.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True))
    assert [token async for delta in generation for token in delta.token_ids] == greedy(prompt, 6)


def test_a_page_table_beyond_scalar_memory_is_refused():
    wide = jnp.zeros((64, 4096), jnp.int32)
    with pytest.raises(StartupError, match="raise page_size"):
        check_page_table(Batch(wide, wide[:, 0], wide[0, :65], wide[0]))
