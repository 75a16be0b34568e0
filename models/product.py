"""Products of activations with weights of fewer bits, and rows of such weights.

XLA for CPUs has no fast product of float32 with bfloat16 or 8-bit numbers, so the weight is widened first. For one row
of activations widening and product are one loop over the weight, which then takes as long as reading it. For more rows
a block of the weight at a time is widened, small enough to stay in the processor's cache until it has been multiplied;
that needs a compiler that runs things in order (``COMPILER_OPTIONS`` of :mod:`astraea_jax.engine.step`), or else all
weights are widened first and the copies are read back from memory. Other devices widen inside of the product.

Weights of bfloat16 are kept as integers of the same bits there, since XLA would widen a whole weight to slice it; and
those of float8, since XLA converts them slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

BITS = jnp.dtype(jnp.uint16)
"""Dtype of weights that hold the bits of bfloat16 numbers."""
BITS_OF = {jnp.dtype(jnp.bfloat16): BITS, jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.uint8)}
"""Dtype of weights -> that of integers of the same bits, which a CPU widens faster."""
WIDENED_AT_ONCE = 2**21
"""Numbers of a weight that are widened at once: 8 MiB in float32."""
PANEL = 64
"""Outputs of a panel. The kernel of CPUs has weights ``[I, O]`` as panels ``[ceil(O / PANEL), I, PANEL]``."""
LANES = 8
"""Numbers of a column that the product of one row adds up before it writes their sum."""


def product(x: jax.Array, weight: jax.Array, *, transposed: bool = False) -> jax.Array:
    """Multiply ``x [T, I]`` by ``weight [I, O]``, or ``[O, I]`` if it is transposed: ``[T, O]`` float32."""
    if x.dtype == weight.dtype == jnp.float32:
        return _multiplied(x, weight, transposed)

    def on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if len(x) == 1 and not transposed and len(weight) % LANES == 0:
            return _of_one_row(x, weight)
        return _in_blocks(x, weight, transposed)

    def elsewhere(x: jax.Array, weight: jax.Array) -> jax.Array:
        return _multiplied(x, weight.astype(x.dtype), transposed)

    result: jax.Array = jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=elsewhere)
    return result


def rows(weight: jax.Array, index: jax.Array, dtype: Any) -> jax.Array:
    """Rows ``[T, D]`` of ``weight [V, D]``, or of the panels of its transpose, in ``dtype``."""
    found = weight[index // PANEL, :, index % PANEL] if weight.ndim == 3 else weight[index]
    return (widened(found) if weight.dtype == BITS else found).astype(dtype)


def _multiplied(x: jax.Array, weight: jax.Array, transposed: bool) -> jax.Array:
    dims = (((1,), (int(transposed),)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32)


def _of_one_row(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product of a single row: sums of ``LANES`` products each, in one loop, and then the sum of those.

    A sum over all of ``I`` would not be vectorised.
    """
    outputs = weight.shape[1]
    factors, parts = x.reshape(-1, LANES), weight.reshape(-1, LANES, outputs)
    sums = sum(factors[:, i, None] * widened(parts[:, i]) for i in range(LANES))
    return jnp.ones((1, len(factors)), jnp.float32) @ sums


def _in_blocks(x: jax.Array, weight: jax.Array, transposed: bool) -> jax.Array:
    """The product, with a block of the weight's outputs widened at a time."""
    axis = 0 if transposed else 1

    def block(first: jax.Array, size: int) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(weight, first, size, axis)
        return _multiplied(x, widened(own), transposed)

    return blockwise(block, len(x), weight.shape[1 - axis], weight.shape[axis])


def blockwise(block: Callable[[jax.Array, int], jax.Array], rows: int, inputs: int, outputs: int) -> jax.Array:
    """A product ``[T, O]`` float32 by blocks of outputs, whose weights fit into the processor's cache when widened.

    Args:
        block: ``block(first, size)``: the product ``[T, size]`` of outputs from ``first``.
        rows: T.
        inputs: of the weight.
        outputs: of the weight.
    """
    size = min(outputs, max(1, WIDENED_AT_ONCE // inputs))
    if size == outputs:
        return block(jnp.int32(0), size)

    def put(i: jax.Array, result: jax.Array) -> jax.Array:
        first = jnp.minimum(i * size, outputs - size)  # the last block computes some outputs of the one before again
        return jax.lax.dynamic_update_slice_in_dim(result, block(first, size), first, 1)

    return jax.lax.fori_loop(0, -(-outputs // size), put, jnp.zeros((rows, outputs), jnp.float32))


def widened(narrow: jax.Array) -> jax.Array:
    """Numbers as float32; unsigned integers stand for the numbers of these bits (:func:`bits`)."""
    if narrow.dtype == jnp.uint8:
        return float8(narrow, 7)
    if narrow.dtype == BITS:
        return jax.lax.bitcast_convert_type(narrow.astype(jnp.uint32) << 16, jnp.float32)
    return narrow.astype(jnp.float32)


@partial(jax.jit, donate_argnums=0)
def bits(weight: jax.Array) -> jax.Array:
    """Integers of the same bits in the place of ``weight``, of bfloat16 or float8, which is used up."""
    return jax.lax.bitcast_convert_type(weight, BITS_OF[weight.dtype])


def float8(codes: jax.Array, exponent: int) -> jax.Array:
    """Floats of up to 8 bits as float32, exactly, by way of float16, whose conversion is fast.

    Args:
        codes: their bits: e4m3 in eight bits, or e2m1 in four.
        exponent: how far their magnitudes are shifted so that exponents meet those of float16: 7 or 9.
    """
    sign, bias = (128, 8) if exponent == 7 else (8, 14)
    wide = codes.astype(jnp.uint16)
    moved = (wide & (sign - 1)) << exponent | (wide & sign) << (8 if sign == 128 else 12)
    return jax.lax.bitcast_convert_type(moved, jnp.float16).astype(jnp.float32) * 2.0**bias
