"""The Triton kernel of grouped products against NumPy, run by Triton's interpreter: `make parity`; see test_gpu.py."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from support.experts import FORMATS, choices, fed_forward, matrix, mixture, numbers

from astraea_jax.kernels.grouped import dispatch
from astraea_jax.kernels.grouped_triton import MOST_ROWS, GroupedTriton

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=[80, 90])
def grouped(request):
    """For GPUs without and with float8. Imported late: collecting tests must work without Triton and PyTorch."""
    from support.interpreted import Interpreted

    return GroupedTriton(Interpreted(compute_capability=request.param))


@pytest.mark.serves("triton", "interpreted", "experts")
@settings(deadline=None, max_examples=25)
@given(case=choices())
def test_every_row_is_the_product_with_its_expert(grouped, case):
    case.check_product(grouped, jnp.float32, 1e-4)


@settings(deadline=None, max_examples=8)
@given(case=choices())
def test_in_half_precision(grouped, case):
    case.check_product(grouped, jnp.float16, 4e-3)


@pytest.mark.serves("triton", "interpreted", "fp8 weights", "int4 weights", "MXFP4 weights")
@pytest.mark.parametrize("form", [name for name, form in FORMATS.items() if form])
@pytest.mark.parametrize("rows", [1, 37])
def test_one_matrix_of_fewer_bits(grouped, form, rows):
    made = matrix((160, 100), FORMATS[form], jnp.float32, seed=rows)
    x = np.random.default_rng(rows).normal(size=(rows, 160)).astype(np.float32)
    out = grouped.multiplied(jnp.asarray(x), made.codes, made.form)
    np.testing.assert_allclose(out, x @ numbers(made), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "limit", "biases"), [("silu", None, False), ("gelu", None, True), ("silu", 0.5, True)]
)
@pytest.mark.parametrize(("form", "size"), [("numbers", 48), ("int4", 64), ("fp4", 96), ("fp8 blocks", 128)])
def test_gathering_biases_and_activation_are_part_of_it(grouped, activation, limit, biases, form, size):
    """Gate and up projection alternate in blocks of 8 to 64 features."""
    made = mixture(form, activation, limit, biases, jnp.float32, size)
    x = np.random.default_rng(size).normal(size=(5, 64)).astype(np.float32) * 5
    index = np.array([[0, 1], [2, 0], [0, 3], [7, 2], [0, 9]], np.int32)
    sent = dispatch(jnp.asarray(index), 4, grouped.block_rows(index.size, 4))
    out = np.asarray(grouped.choices(jnp.asarray(x), sent, made))
    for t, k in np.argwhere(index < 4):
        expected = fed_forward(made, x[t : t + 1], index[t, k])[0]
        np.testing.assert_allclose(out[t, k], expected, rtol=2e-4, atol=2e-4)


@settings(deadline=None, max_examples=25)
@given(case=choices())
def test_choices_are_laid_into_blocks_as_without_the_kernel(grouped, case):
    got = grouped.dispatched(jnp.asarray(case.index), case.experts)
    expected = dispatch(jnp.asarray(case.index), case.experts, grouped.block_rows(case.index.size, case.experts))
    size, used = len(got.tokens) // len(got.blocks.experts), int(expected.blocks.used)
    assert int(got.blocks.used) == used
    np.testing.assert_array_equal(got.blocks.sizes, expected.blocks.sizes)
    np.testing.assert_array_equal(got.blocks.experts[:used], expected.blocks.experts[:used])
    np.testing.assert_array_equal(got.here, expected.here)
    np.testing.assert_array_equal(got.rows, expected.rows)
    filled = np.arange(size) < np.asarray(got.blocks.sizes)[:, None]
    np.testing.assert_array_equal(np.where(filled.ravel(), got.tokens, 0), expected.tokens)


@pytest.mark.parametrize(("rows", "experts", "size"), [(8, 128, 16), (512, 128, 16), (2048, 128, 32), (10**6, 8, 64)])
def test_blocks_grow_with_the_rows_of_an_expert(grouped, rows, experts, size):
    assert grouped.block_rows(rows, experts) == size <= MOST_ROWS
