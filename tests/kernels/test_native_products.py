"""Products with weights in panels on CPUs: equal to NumPy's, and each row by itself."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from astraea_jax.kernels.native.library import load
from astraea_jax.kernels.native.products import in_panels, multiply, product, put_in_panels
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.formats import FORMATS
from astraea_jax.models.matrix import Matrix, everywhere
from astraea_jax.models.matrix import multiply as multiply_elsewhere
from astraea_jax.models.product import bits, rows

KINDS = ["float32", "bfloat16", "int8"]


@pytest.fixture(autouse=True, scope="module")
def loaded():
    load()


def stored(kind: str, inputs: int, outputs: int) -> tuple[jax.Array, np.ndarray]:
    """Panels of a random weight, and its numbers as float32."""
    numbers = np.random.default_rng(inputs).normal(0, 40, (inputs, outputs)).astype(np.float32)
    weight = jnp.asarray(numbers, kind)
    widened = np.asarray(weight.astype(jnp.float32))
    return in_panels(bits(weight) if kind == "bfloat16" else weight), widened


def random_rows(count: int, inputs: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, inputs)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 150),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 300),
)
def test_products_are_those_of_numpy(kind, count, inputs, outputs):
    panels, widened = stored(kind, inputs, outputs)
    x = random_rows(count, inputs)
    found = jax.jit(product)(x, panels)
    assert found.shape == (count, -(-outputs // 64) * 64)
    np.testing.assert_allclose(found[:, :outputs], x @ widened, rtol=1e-4, atol=2e-2)
    assert not found[:, outputs:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bits_whatever_is_beside_it(kind):
    panels, _ = stored(kind, 700, 130)
    x = random_rows(260, 700)
    whole = np.asarray(product(x, panels))
    for count in (1, 2, 5, 6, 7, 8, 13, 23, 24, 60, 259):
        np.testing.assert_array_equal(product(x[:count], panels), whole[:count])
        np.testing.assert_array_equal(product(x[-count:], panels), whole[-count:])


@pytest.mark.parametrize("used", [0, 1, 7, 19, 20])
def test_rows_that_are_not_in_use_are_zero(used):
    panels, _ = stored("float32", 30, 100)
    x = random_rows(20, 30)
    whole = np.asarray(product(x, panels))
    x[used:] = np.nan
    found = jax.jit(partial(product, used=jnp.int32(used)))(x, panels)
    np.testing.assert_array_equal(found[:used], whole[:used])
    assert not np.asarray(found[used:]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_stays_in_its_row_and_column(bad):
    panels, widened = stored("float32", 9, 70)
    x = random_rows(8, 9)
    x[3, 4] = bad
    found = np.asarray(product(x, panels))[:, :70]
    assert not np.isfinite(found[3]).any()
    np.testing.assert_allclose(np.delete(found, 3, 0), np.delete(x, 3, 0) @ widened, rtol=1e-4, atol=1e-2)
    weight = np.ones((9, 70), np.float32)
    weight[2, 65] = bad
    found = np.asarray(product(np.ones((8, 9), np.float32), in_panels(jnp.asarray(weight))))[:, :70]
    assert not np.isfinite(found[:, 65]).any()
    assert (np.delete(found, 65, 1) == 9).all()


@pytest.mark.parametrize("form", [None, "int8", "fp8", "int4"])
def test_matrices_of_all_forms_are_multiplied(form):
    """Those that have no panels are left to XLA."""
    matrix = Matrix((64, 100), jnp.float32, FORMATS[form] if form else None, nnx.Rngs(0))
    x = jnp.asarray(random_rows(5, 64))
    expected = multiply_elsewhere(x, matrix)
    decoder = _decoder(form)
    put_in_panels(decoder)
    own = next(module for _, module in nnx.iter_modules(decoder) if isinstance(module, Matrix))
    assert (own.weight.ndim == 3) == (form in (None, "int8"))
    if matrix.form is None or form == "int8":
        matrix.weight = nnx.Param(in_panels(matrix.weight[...]))
    np.testing.assert_allclose(multiply(x, matrix), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_of_tokens_is_looked_up_and_multiplied(tied, dtype):
    decoder = _decoder(None, tied=tied, dtype=dtype)
    decoder.keep_bits()
    tokens = jnp.array([0, 99, 64, 63, 7])
    hidden = jnp.asarray(random_rows(3, 32))
    found = rows(decoder.embed.weight[...], tokens, jnp.float32)
    logits = decoder.logits(hidden)
    put_in_panels(decoder)
    assert (decoder.embed if tied else decoder.lm_head).weight.shape == (2, 32, 64)
    np.testing.assert_array_equal(rows(decoder.embed.weight[...], tokens, jnp.float32), found)
    np.testing.assert_allclose(decoder.logits(hidden, product), logits, rtol=1e-4, atol=1e-5)


def test_loops_of_several_devices_that_follow_each_other_closely_stay_apart():
    """A thread that looks for further loops takes part in those of all devices, which end and begin at any time."""

    @jax.jit
    def chain(x: jax.Array, panels: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 300, lambda _, x: jnp.tanh(product(x, panels)), x)

    panels, _ = stored("float32", 192, 192)
    starts = [jax.device_put((random_rows(n, 192), panels), device) for n, device in enumerate(jax.devices()[:8], 1)]
    alone = [np.asarray(chain(*start)) for start in starts]
    for _ in range(5):
        for found, expected in zip([chain(*start) for start in starts], alone, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_sizes_that_do_not_fit_are_an_error():
    panels, _ = stored("float32", 16, 64)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"panels \[ceil\(O / 64\), I, 64\]"):
        product(random_rows(2, 17), panels).block_until_ready()
    for count in (-1, 3):
        with pytest.raises(jax.errors.JaxRuntimeError, match="0 to T rows are used"):
            product(random_rows(2, 16), panels, used=jnp.int32(count)).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match="float32, bits of bfloat16 or int8"):
        product(random_rows(2, 16), panels.astype(jnp.float16)).block_until_ready()


def _decoder(form: str | None, *, tied: bool = True, dtype: str = "float32") -> Decoder:
    config = ModelConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position=64,
        tie_embeddings=tied,
    )
    return Decoder(config, dtype=jnp.dtype(dtype), forms=everywhere(FORMATS[form] if form else None), rngs=nnx.Rngs(1))
