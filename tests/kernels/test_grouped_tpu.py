"""Our TPU kernel for grouped products, interpreted, against dequantised matrices; unwritten memory is poisoned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the only way to ask for the races found
from jax.experimental.pallas import tpu as pltpu
from support.experts import widened

from astraea_jax.kernels import grouped_tpu
from astraea_jax.kernels.grouped import dispatch
from astraea_jax.kernels.grouped_tpu import GroupedTPU, inputs_at_once, tile_of
from astraea_jax.models.formats import Format
from astraea_jax.models.matrix import InStack, Matrix
from astraea_jax.models.narrow import Codes

EXPERTS, SIZE = 4, 16
KERNEL = GroupedTPU(pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))
FORMS = {
    "plain": None,
    "int8 channels": Format("int8"),
    "e4m3 channels": Format("fp8"),
    "e4m3 blocks": Format("fp8", 128, 128),
    "int4 groups": Format("int4", 64, scales="float16"),
    "int4 groups with zeros": Format("int4", 32, zeros=True, scales="bfloat16"),
    "MXFP4": Format("fp4", 32),
}


def matrix_of(shape: tuple[int, ...], dtype: str, form: Format | None, seed: int) -> Matrix:
    """A random matrix; its zeros differ, too."""
    matrix = Matrix(shape, jnp.dtype(dtype), form, nnx.Rngs(seed))
    if form is not None and form.zeros:
        drawn = np.random.default_rng(seed).integers(0, 16, matrix.zeros.shape)
        matrix.zeros[...] = jnp.asarray(drawn, jnp.int8)
    return matrix


def weights_of(matrix: Matrix) -> np.ndarray:
    """What it stands for, in float32."""
    if matrix.form is None:
        return np.asarray(matrix.weight[...], np.float32)
    arrays = [None if part is None else part.reshape(-1, *part.shape[-2:]) for part in matrix.codes]
    each = [Codes(*(None if a is None else a[e] for a in arrays)) for e in range(len(arrays[0]))]
    wide = np.stack([widened(codes, matrix.form, jnp.float32) for codes in each])
    return wide if matrix.weight.ndim == 3 else wide[0]


@pytest.mark.serves("pallas", "interpreted", "experts", "fp8 weights", "int4 weights", "MXFP4 weights")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("inputs", "outputs", "dtype"), [(192, 320, "float32"), (256, 128, "bfloat16")])
@settings(deadline=None, max_examples=3)
@given(data=st.data())
def test_blocks_are_multiplied_by_their_experts(form, inputs, outputs, dtype, data):
    """Two tiles of outputs and more than one part of the inputs where there are codes; the last tile is not full."""
    chosen = data.draw(st.lists(st.integers(0, EXPERTS), min_size=12, max_size=12))  # EXPERTS: elsewhere
    seed = data.draw(st.integers(0, 2**16))
    matrix = matrix_of((EXPERTS, inputs, outputs), dtype, FORMS[form], seed)
    sent = dispatch(jnp.asarray(chosen).reshape(6, 2), EXPERTS, SIZE)
    x = jax.random.normal(jax.random.key(seed), (len(sent.tokens), inputs)).astype(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_tpu, "TILE_NUMBERS", 256 * inputs)
        patch.setattr(grouped_tpu, "WIDENED_AT_ONCE", 64)
        out = KERNEL.product(x, matrix, sent.blocks)

    assert out.dtype == dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()
    of_block = np.asarray(x, np.float32).reshape(-1, SIZE, inputs)
    expected = np.einsum("nbi,nio->nbo", of_block, weights_of(matrix)[np.asarray(sent.blocks.experts)])
    used = np.arange(SIZE) < np.asarray(sent.blocks.sizes)[:, None]
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    got = np.asarray(out, np.float32).reshape(expected.shape)
    np.testing.assert_allclose(got[used], expected[used], rtol=tolerance, atol=tolerance)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("form", [form for form in FORMS if form != "plain"])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_a_single_matrix_is_multiplied_as_in_numpy(form, rows):
    """A last block of e4m3 that is not whole along both axes, too."""
    inputs, outputs = (200, 136) if FORMS[form].per_item == 1 else (192, 136)
    matrix = matrix_of((inputs, outputs), "float32", FORMS[form], rows)
    x = jax.random.normal(jax.random.key(rows), (rows, inputs))
    out = GroupedTPU(interpret=True).multiply(x, matrix)
    np.testing.assert_allclose(out, np.asarray(x) @ weights_of(matrix), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", ["plain", "MXFP4"])
def test_a_layer_is_read_in_its_stack(form):
    """Of stacked layers the whole is read, and the layer's own arrays are not looked at."""
    layers = [matrix_of((EXPERTS, 64, 128), "float32", FORMS[form], seed) for seed in range(3)]
    graph, state = nnx.split(layers[1])
    stacked = nnx.merge(graph, jax.tree.map(lambda *parts: jnp.stack(parts), *map(nnx.state, layers)))
    sent = dispatch(jnp.array([[0, 2], [3, 2]]), EXPERTS, SIZE)
    x = jax.random.normal(jax.random.key(0), (len(sent.tokens), 64))
    kernel = GroupedTPU(interpret=True)
    expected = kernel.product(x, layers[1], sent.blocks)
    spoilt = nnx.merge(graph, jax.tree.map(jnp.zeros_like, state))
    spoilt.stack = InStack(stacked, jnp.int32(1))
    np.testing.assert_array_equal(kernel.product(x, spoilt, sent.blocks), expected)


@given(inputs=st.integers(1, 512).map(lambda n: 32 * n), outputs=st.integers(1, 20_000))
def test_tiles_fit_and_waste_little(inputs, outputs):
    tile = tile_of(inputs, outputs)
    assert tile == outputs or (tile % 128 == 0 and inputs * tile <= grouped_tpu.TILE_NUMBERS)
    assert -(-outputs // tile) * tile <= outputs + 512


@given(n=st.integers(1, 300), form=st.sampled_from([form for form in FORMS.values() if form]))
def test_codes_are_widened_in_whole_groups(n, form):
    inputs = 32 * n
    at_once = inputs_at_once(inputs, form)
    assert inputs % at_once == 0
    assert at_once == inputs or at_once % (form.inputs or 1) == 0


def test_few_rows_come_in_small_blocks_and_many_in_full_ones():
    kernel = GroupedTPU()
    assert [kernel.block_rows(rows, 128) for rows in (8, 64 * 8, 2048 * 8, 8192 * 8)] == [16, 16, 128, 128]
