"""Eight-bit weights: how far they are from the wide ones, what they weigh, and that loading makes them one by one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from astraea_jax.models import CheckpointError
from astraea_jax.models.checkpoint import load, save_hf, save_orbax
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.formats import FORMATS, quantize
from astraea_jax.models.matrix import Matrix, everywhere, multiply

CONFIG = ModelConfig(64, 32, 48, 2, 4, 2, 16, 128, qkv_bias=True)
INT8, FP8 = FORMATS["int8"], FORMATS["fp8"]
quantized = jax.jit(quantize, static_argnums=1)
each = pytest.mark.parametrize("form", [INT8, FP8], ids=lambda form: form.codes)
SCALES = "scales"


@functools.cache
def made(narrow):
    """Random numbers, drawn by NumPy, which is quicker than to compile JAX's draws."""
    decoder = nnx.eval_shape(lambda: Decoder(CONFIG, dtype=jnp.float32, forms=everywhere(narrow), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    fill = lambda x: jnp.asarray(rng.normal(0, 1 if x.dtype == "float32" else 40, x.shape).astype(x.dtype))  # noqa: E731
    nnx.update(decoder, jax.tree.map(fill, nnx.state(decoder)))
    return decoder


def parameters(decoder):
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(decoder))}


def scales_of(name):
    return name.removesuffix("weight") + SCALES


def assert_same(a, b):
    a, b = parameters(a), parameters(b)
    assert {name: x.dtype for name, x in a.items()} == {name: x.dtype for name, x in b.items()}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@st.composite
def weights(draw):
    """``[8, 5]`` with channels of very different sizes, some zero, some with one number far above the others."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.normal(size=(8, 5)).astype(np.float32)
    sizes = st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0, 3e4, 1e30])
    weight *= np.array(draw(st.lists(sizes, min_size=5, max_size=5)), np.float32)
    weight[draw(st.integers(0, 7))] *= draw(st.sampled_from([1.0, 100.0]))
    return weight


@each
@settings(deadline=None, max_examples=40)
@given(weight=weights())
def test_every_number_comes_back_within_half_a_step(form, weight):
    values, scale = map(np.asarray, quantized(weight, form))
    assert values.dtype == form.dtype
    assert values.shape == weight.shape
    assert scale.shape == (1, 5)
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    error = np.abs(values.astype(np.float64) * scale - weight)
    # int8: half a step. float8: three bits of fraction, so a 16th at most, and below 2**-6 steps of 2**-9.
    step = 0.5 if form == INT8 else np.maximum(np.abs(weight / scale) / 16, 2.0**-10)
    peak = np.abs(weight).max(0)
    assert (error <= np.where(peak < 1e-35, peak, 1.001 * step * scale)).all()
    largest = 127 if form == INT8 else 448
    reached = np.abs(values.astype(np.float32)).max(0)
    assert (reached == np.where(peak < 1e-35, 0, largest)).all()


@each
def test_what_is_not_finite_stays_to_be_seen(form):
    weight = np.ones((4, 2), np.float32)
    weight[1, 0] = np.nan
    _, scale = quantized(weight, form)
    assert np.isnan(scale[0, 0])
    assert np.isfinite(scale[0, 1])


@each
@pytest.mark.parametrize("wide", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_product_is_that_of_the_values_scaled(form, wide):
    """Also in float16, whose range the sums before the scale exceed."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(30 * rng.normal(size=(3, 64)), wide)
    weight = rng.normal(size=(64, 10)).astype(np.float32)
    values, scale = quantized(weight, form)
    matrix = Matrix((64, 10), jnp.float32, form, nnx.Rngs(0))
    matrix.weight, matrix.scales = nnx.Param(values), nnx.Param(scale)
    out = multiply(x, matrix)
    assert out.dtype == wide
    exact = np.asarray(x, np.float64) @ np.asarray(values, np.float64) * np.asarray(scale)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=float(jnp.finfo(wide).eps), atol=1e-3)


@each
def test_matrices_are_a_quarter_and_the_rest_stays(form):
    wide, narrow = (parameters(made(d)) for d in (None, form))
    scales = {name for name in narrow if name.endswith(SCALES)}
    assert narrow.keys() - scales == wide.keys()
    assert len(scales) == 4 * CONFIG.num_layers
    for name, x in wide.items():
        if scales_of(name) in scales:
            assert 4 * narrow[name].nbytes == x.nbytes
            assert narrow[scales_of(name)].dtype == jnp.float32
        else:
            assert narrow[name].dtype == jnp.float32


@each
def test_loading_quantises_what_the_file_holds(form, tmp_path):
    """Not what is left of it in the dtype of the activations; and the same from either kind of folder."""
    wide = made(None)
    save_hf(wide, tmp_path / "hf")
    save_orbax(wide, tmp_path / "orbax")
    loaded = load(tmp_path / "hf", jnp.float32, quantize=form)
    assert_same(load(tmp_path / "orbax", jnp.float32, quantize=form), loaded)
    halves = parameters(load(tmp_path / "hf", jnp.bfloat16, quantize=form))
    for name, weight in parameters(loaded).items():
        if scales_of(name) in halves:
            values, scale = quantized(parameters(wide)[name], form)
            np.testing.assert_array_equal(halves[name], values)
            np.testing.assert_array_equal(halves[scales_of(name)], scale)
            np.testing.assert_array_equal(weight, values)
    assert halves["embed.weight"].dtype == jnp.bfloat16


@each
def test_quantised_weights_are_kept_by_orbax_only(form, tmp_path):
    decoder = made(form)
    save_orbax(decoder, tmp_path)
    assert_same(load(tmp_path, jnp.float32), decoder)
    assert_same(load(tmp_path, jnp.float32, quantize=form), decoder)
    other = FP8 if form == INT8 else INT8
    with pytest.raises(CheckpointError, match=f"is quantized to {form.codes}, not to {other.codes}"):
        load(tmp_path, jnp.float32, quantize=other)
    with pytest.raises(CheckpointError, match="Orbax"):
        save_hf(decoder, tmp_path / "hf")


def test_no_second_copy_while_loading(tmp_path):
    save_hf(made(None), tmp_path)
    size = {d: sum(x.nbytes for x in jax.tree.leaves(nnx.state(made(d)))) for d in (None, INT8)}
    largest = max(x.nbytes for x in jax.tree.leaves(nnx.state(made(None))))
    there: list[jax.Array] = jax.live_arrays()  # kept, or else others would get their ids
    before, seen = {id(x) for x in there}, []

    def watch(done, total):
        seen.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))

    load(tmp_path, jnp.float32, quantize=INT8, progress=watch)
    assert size[INT8] - 1024 < max(seen) <= size[INT8] + largest < size[None]
