"""The kernels in C++ against a few lines of NumPy and the reference, over random ragged batches."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, PartitionSpec
from support.ragged import VARIANTS, Ragged, like_a_model, ragged

from astraea_jax.errors import StartupError
from astraea_jax.kernels import Batch, Native, Reference
from astraea_jax.models.heads import PLAIN, Heads, Switches

NARROW = ["bfloat16", "float8_e4m3fn"]


@pytest.mark.serves(
    "native", "tested", "prefill and decode in one step", "grouped queries, any ratio", "windows", "score caps"
)
@settings(deadline=None, max_examples=60)
@given(case=ragged(), variant=VARIANTS)
def test_matches_numpy(case, variant):
    case = case.switched(*variant).behind(variant[0].window)
    case.check(case.attend(Native()), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.serves("native", "tested", "bfloat16", "fp8 KV")
@pytest.mark.parametrize("kv_dtype", NARROW)
@settings(deadline=None, max_examples=20)
@given(case=ragged(), variant=VARIANTS)
def test_narrow_pages_are_as_the_reference_writes_and_reads_them(kv_dtype, case, variant):
    case = case.switched(*variant).behind(variant[0].window)
    case.check_alike(Native(), Reference(), jnp.float32, jnp.dtype(kv_dtype))


@pytest.mark.serves("native", "tested", "heads of 64, 128, 256", "pages of 16 to 128 tokens")
@pytest.mark.parametrize(
    ("size", "kv_heads", "group", "head"),
    [
        (128, 1, 1, 256),
        (5, 1, 1, 10),
        (3, 1, 16, 24),
        (7, 2, 5, 6),
        (16, 3, 3, 64),
        (64, 2, 4, 128),
        (16, 1, 2, 80),
        (32, 1, 200, 8),
    ],
)
@pytest.mark.parametrize("switches", [PLAIN, Switches(window=70, soft_cap=3.0), Switches(window=2100)])
def test_any_sizes_and_contexts_longer_than_what_is_attended_to_at_a_time(size, kv_heads, group, head, switches):
    q_lens, past = [1, 60, 0, 1, 3, 1], [700, 2040, 0, 0, 4150, 255]
    case = Ragged.make(size, kv_heads, group, head, q_lens, past, 0, rotated=True, normed=True)
    case = case.switched(switches, sinks=switches.window == 70).behind(switches.window)
    case.check(case.attend(Native()), case.expected(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("decode", "kv_dtype"), [(False, None), (True, "float8_e4m3fn")])
def test_activations_in_bfloat16_are_rounded_as_by_the_reference(decode, kv_dtype):
    case = like_a_model(decode, True, 16, 2, 3, 64, 3)
    case.check_alike(Native(), Reference(), jnp.bfloat16, kv_dtype and jnp.dtype(kv_dtype))


@pytest.mark.parametrize("kv_dtype", NARROW)
def test_numbers_are_rounded_to_the_bits_that_xla_has(kv_dtype):
    """Those that lie between two others, too small ones, too large ones, and none at all."""
    kv_dtype, rng = jnp.dtype(kv_dtype), np.random.default_rng(0)
    least = 2.0**-11 if kv_dtype.itemsize == 1 else 1e-30
    numbers = rng.choice([-1, 1], 2500) * np.exp(rng.uniform(np.log(least), np.log(470), 2500))
    tied = sum(x.astype(kv_dtype).astype(np.float64) for x in (numbers, numbers * (1 + jnp.finfo(kv_dtype).eps))) / 2
    numbers = np.concatenate([numbers, tied, [0, -0.0, np.nan, np.inf, -np.inf, 1e5, 2.0**-10, 3 * 2.0**-10, 464]])
    kv = jnp.asarray(np.resize(numbers, (160, 1, 32)), jnp.float32)
    batch = Batch(jnp.arange(1, 11)[None], jnp.array([160]), jnp.array([0, 160]), jnp.arange(16, 176))
    written = []
    for backend in (Native(), Reference()):
        pages = jnp.zeros((11, 2, 1, 16, 32), backend.page_dtype(kv_dtype))
        _, pages = jax.jit(partial(backend.attend, q_tile=16))(Heads.of(kv, kv, kv), pages, batch)
        written.append(np.asarray(pages).view(kv_dtype).astype(np.float32))
    np.testing.assert_array_equal(*written)


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn", "bfloat16"])
def test_what_is_not_a_number_stays_so(kv_dtype):
    """A step recognises broken rows by logits that are no numbers; other rows are not affected."""
    case = Ragged.make(4, 1, 2, 16, [1, 1, 5], [9, 9, 3], 0)
    case.v[0], case.k[2] = np.nan, np.nan
    out, _ = case.attend(Native(), kv_dtype=kv_dtype and jnp.dtype(kv_dtype))
    assert np.isnan(out[0]).all()
    assert np.isnan(out[2:7]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("kv_dtype", [None, *NARROW])
@pytest.mark.parametrize("queries", [1, 5, 60])
def test_a_row_is_the_same_bits_whatever_is_beside_it(queries, kv_dtype):
    """Alone, the context of a row is shared by threads; among others, one thread attends to all of it."""
    others = [1, 1, 40, 3, 1, 1, 1, 100, 1, 1, 1, 1]
    past = [5000, *range(3000, 3000 + len(others))]
    crowd = Ragged.make(16, 1, 2, 32, [queries, *others], past, 1, rotated=True, normed=True)
    table, lens, cu, slots = crowd.batch
    one = slice(0, queries)
    alone = Ragged(
        crowd.q[one],
        crowd.k[one],
        crowd.v[one],
        pages=crowd.pages,
        batch=Batch(table[:1], lens[:1], cu[:2], slots[one]),
        q_tile=1 if queries == 1 else 16,
        angle=crowd.angle[one],
        norms=crowd.norms,
    )
    dtype = kv_dtype and jnp.dtype(kv_dtype)
    expected, _ = crowd.attend(Native(), kv_dtype=dtype)
    for _ in range(3):
        np.testing.assert_array_equal(alone.attend(Native(), kv_dtype=dtype)[0], expected[one])


def test_pages_are_written_in_place():
    case = like_a_model(True, False, 16, 2, 2, 32, 0)
    pages = jnp.zeros((4096, *case.pages.shape[1:]), jnp.float32)
    step = jax.jit(partial(Native().attend, q_tile=1), donate_argnums=1)
    compiled = step.lower(case.heads(jnp.float32), pages, case.batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pages.nbytes / 100
    place = pages.unsafe_buffer_pointer()
    _, kept = compiled(case.heads(jnp.float32), pages, case.batch)
    assert kept.unsafe_buffer_pointer() == place
    assert np.asarray(kept).any()


def test_devices_of_one_process_attend_at_the_same_time():
    """As tensor parallelism does it: each device has some of the heads, and all share one pool of threads."""
    case = Ragged.make(16, 4, 2, 32, [1, 80, 1, 3], [3000, 500, 40, 900], 0, 3100, rotated=True)
    mesh = Mesh(jax.devices()[:4], "x")
    by_head, nowhere = PartitionSpec(None, "x"), PartitionSpec()
    heads = case.heads(jnp.float32)
    specs = Heads(by_head, nowhere, nowhere, eps=heads.eps)
    pages = PartitionSpec(None, None, "x")
    attend = jax.jit(
        jax.shard_map(
            partial(Native().attend, q_tile=16),
            mesh=mesh,
            in_specs=(specs, pages, nowhere),
            out_specs=(by_head, pages),
            check_vma=False,
        )
    )
    for _ in range(10):
        out, kept = attend(heads, jnp.asarray(case.pages), case.batch)
        case.check((np.asarray(out), np.asarray(kept)), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("page_table", 10**6, "a page that is not there"),
        ("kv_lens", 10**6, "longer than its pages"),
        ("cu_q_lens", 10**6, "the first row does not start"),
        ("slot_mapping", -1, "a slot that is not there"),
    ],
)
def test_places_outside_of_memory_are_an_error(field, value, why):
    case = like_a_model(True, False, 16, 1, 1, 16, 0)
    batch = case.batch._replace(**{field: np.full_like(getattr(case.batch, field), value)})
    with pytest.raises(jax.errors.JaxRuntimeError, match=why):
        jax.block_until_ready(Native().attend(case.heads(jnp.float32), jnp.asarray(case.pages), batch, q_tile=1))


def test_dtypes_without_a_kernel_are_refused():
    with pytest.raises(StartupError, match="not float16"):
        Native().page_shape(1, 16, 64, "float16")
