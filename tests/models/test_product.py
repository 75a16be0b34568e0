"""Products with narrow weights: equal to those of the widened ones, whatever the number of rows and of blocks."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astraea_jax.models import product as module
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.operations import Operations
from astraea_jax.models.product import BITS, bits, product, rows

KINDS = ["float32", "bfloat16", "bits", "float16", "int8", "float8_e4m3fn"]


def weight(kind, shape):
    """A random weight in memory, and the same numbers as float32."""
    numbers = np.random.default_rng(0).normal(0, 40, shape).astype(np.float32)
    stored = jnp.asarray(numbers, jnp.bfloat16 if kind == "bits" else kind)
    widened = np.asarray(stored.astype(jnp.float32))
    return bits(stored) if kind == "bits" else stored, widened


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 24), (12, 7), (8, 101)])
def test_products_are_those_of_the_widened_weight(monkeypatch, kind, transposed, count, inputs, outputs):
    """Blocks of 320 numbers, some of which overlap the one before; or else of a single output."""
    monkeypatch.setattr(module, "WIDENED_AT_ONCE", 320 if inputs < 16 else 10)
    stored, widened = weight(kind, (outputs, inputs) if transposed else (inputs, outputs))
    x = np.random.default_rng(1).normal(size=(count, inputs)).astype(np.float32)
    found = jax.jit(lambda x, w: product(x, w, transposed=transposed))(x, stored)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, x @ (widened.T if transposed else widened), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_widened(kind):
    stored, widened = weight(kind, (9, 4))
    index = jnp.array([8, 0, 0, 5])
    np.testing.assert_array_equal(rows(stored, index, jnp.float32), widened[np.array(index)])


@pytest.mark.parametrize("kind", ["bits", "int8"])
@pytest.mark.parametrize("count", [1, 4])
def test_no_widened_copy_of_a_large_weight_is_made(monkeypatch, kind, count):
    """A step needs no memory in which a whole weight would be wide."""
    monkeypatch.setattr(module, "WIDENED_AT_ONCE", 2**12)
    stored, _ = weight(kind, (256, 512))
    compiled = jax.jit(product).lower(jnp.ones((count, 256)), stored).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * stored.size / 2
    assert not re.search(r"f32\[256,512\]\S* fusion", compiled.as_text())


def test_a_decoder_of_bits_computes_the_same():
    config = ModelConfig(64, 32, 48, 2, 4, 2, 16, 128, qkv_bias=True, qk_norm=True)
    decoder: Any = Decoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokens = jnp.arange(5)

    @nnx.jit
    def logits(decoder):
        attend = lambda layer, heads, cache: (heads.rotated()[0], cache)  # noqa: E731
        return decoder.logits(decoder(tokens, tokens, (None,) * 2, Operations(attend), dtype=jnp.float32)[0])

    expected = logits(decoder)
    for _ in range(2):  # again changes nothing
        decoder.keep_bits()
    assert decoder.embed.weight[...].dtype == decoder.layers[0].mlp.down.weight[...].dtype == BITS
    assert decoder.norm.scale.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits(decoder), expected, rtol=1e-5, atol=1e-6)
