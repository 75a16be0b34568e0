"""Products of activations with matrices of codes and scales (:mod:`.formats`), in jax.numpy.

On CPUs nothing is widened as a whole. For one row of activations, codes are unpacked, converted, multiplied and summed
in one loop over the matrix; a sum never spans more inputs than share a scale, and is scaled in the same loop. For more
rows a block of outputs at a time is dequantized, small enough to stay in the processor's cache until it has been
multiplied. Other devices have kernels; here the compiler dequantizes the matrix that it multiplies.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .formats import MIDDLE, PACKED, Format, unpacked
from .product import LANES, blockwise, float8, product


class Codes(NamedTuple):
    """Arrays of a matrix ``[I, O]``."""

    weight: jax.Array
    """Codes, as the form stores them."""
    scales: jax.Array
    """``form.grid(I, O)``."""
    zeros: jax.Array | None
    """As large as the scales, int8, or None."""


def narrow_product(x: jax.Array, codes: Codes, form: Format) -> jax.Array:
    """Multiply ``x [T, I]`` by a matrix ``[I, O]`` of this form: ``[T, O]`` float32."""
    if form.by_output:
        return product(x, codes.weight) * codes.scales[0].astype(jnp.float32)

    def on_cpu(x: jax.Array, codes: Codes) -> jax.Array:
        x = x.astype(jnp.float32)
        if len(x) == 1 and _loops(x.shape[1], form):
            return _of_one_row(x, codes, form)
        by_output = _by_output(codes, form)

        def block(first: jax.Array, size: int) -> jax.Array:
            return _of_block(x, _sliced(by_output, first, size), replace(form, outputs=1))

        return blockwise(block, len(x), x.shape[1], codes.weight.shape[1])

    def elsewhere(x: jax.Array, codes: Codes) -> jax.Array:
        return jnp.dot(x, dequantized(codes, form, x.dtype), preferred_element_type=jnp.float32)

    result: jax.Array = jax.lax.platform_dependent(x, codes, cpu=on_cpu, default=elsewhere)
    return result


def dequantized(codes: Codes, form: Format, dtype: Any) -> jax.Array:
    """The weights ``[I, O]``, computed in float32."""
    inputs, outputs = codes.weight.shape[0] * form.per_item, codes.weight.shape[1]
    numbers = _values(unpacked(codes.weight) if form.per_item == 2 else codes.weight, form)
    return _scaled(numbers, codes, form, form.inputs or inputs, outputs).astype(dtype)


def _of_block(x: jax.Array, codes: Codes, form: Format) -> jax.Array:
    """The product of several rows ``[T, I]`` with a block of outputs; scales are by output."""
    return functools.reduce(jnp.add, (part @ weights for part, weights in _parts(x, codes, form)))


def _parts(x: jax.Array, codes: Codes, form: Format) -> list[tuple[jax.Array, jax.Array]]:
    """Rows and weights whose products add up to that of rows ``[T, I]`` with a matrix; scales are by output.

    Each half of packed bytes is a part by itself: codes are never put into the order of inputs.
    """
    size, inputs = PACKED // 2, form.inputs or x.shape[1]
    if form.per_item == 1 or inputs % PACKED:
        return [(x, dequantized(codes, form, x.dtype))]
    halves = x.reshape(len(x), -1, 2, size)
    return [
        (halves[:, :, i].reshape(len(x), -1), _scaled(_values(part, form), codes, form, inputs // 2, part.shape[1]))
        for i, part in enumerate((codes.weight & 15, codes.weight >> 4))
    ]


def _scaled(numbers: jax.Array, codes: Codes, form: Format, rows: int, columns: int) -> jax.Array:
    """Numbers ``[n, O]`` less their zeros, times their scales, each of which is that of so many rows."""
    zeros: jax.Array | float = MIDDLE if form.codes == "int4" else 0
    if codes.zeros is not None:
        zeros = _of_each(codes.zeros, form, columns)[:, None]
    scales = _of_each(codes.scales, form, columns)[:, None]
    count = len(numbers)
    if count % rows:  # the last block of inputs is smaller
        numbers = jnp.pad(numbers, ((0, -count % rows), (0, 0)))
    parts = (numbers.reshape(-1, rows, columns) - zeros) * scales
    return parts.reshape(-1, columns)[:count]


def parts_of_outputs(
    x: jax.Array, codes: Codes, form: Format, first: jax.Array, size: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Rows and weights, both float32, whose products add up to that of rows ``[T, I]`` with consecutive outputs."""
    return _parts(x, _sliced(_by_output(codes, form), first, size), replace(form, outputs=1))


def _by_output(codes: Codes, form: Format) -> Codes:
    """The same with scales and zeros of every output, float32."""
    outputs = codes.weight.shape[1]
    zeros = None if codes.zeros is None else _of_each(codes.zeros, form, outputs)
    return codes._replace(scales=_of_each(codes.scales, form, outputs), zeros=zeros)


def _sliced(codes: Codes, first: jax.Array, size: int) -> Codes:
    own: Codes = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, first, size, 1), codes)
    return own


def _of_each(grid: jax.Array, form: Format, columns: int) -> jax.Array:
    """Scales or zeros ``[n, columns]`` float32 of every output."""
    wide = grid.astype(jnp.float32)
    return jnp.repeat(wide, form.outputs, axis=1)[:, :columns] if form.outputs > 1 else wide


def _loops(inputs: int, form: Format) -> bool:
    """Whether inputs that share a scale are whole sums of the product of one row."""
    summed = _summed(form)
    return inputs % summed == 0 and (form.inputs is None or form.inputs % summed == 0)


def _summed(form: Format) -> int:
    """Products that are added up in one pass of the loop of one row."""
    return PACKED if form.per_item == 2 else LANES


def _of_one_row(x: jax.Array, codes: Codes, form: Format) -> jax.Array:
    """The product of a single row: sums over a few inputs each, in one loop with their scales; then their sum.

    A sum over all inputs would not be vectorised.
    """
    summed, inputs, outputs = _summed(form), x.shape[1], codes.weight.shape[1]
    factors = x.reshape(-1, summed)
    rows = codes.weight.reshape(len(factors), -1, outputs)
    sums = jnp.zeros((len(factors), outputs), jnp.float32)
    for i in range(rows.shape[1]):
        if form.per_item == 1:
            sums = sums + factors[:, i, None] * _values(rows[:, i], form)
        else:
            low, high = (_values(half, form) for half in (rows[:, i] & 15, rows[:, i] >> 4))
            sums = sums + factors[:, i, None] * low + factors[:, PACKED // 2 + i, None] * high
    shared = (form.inputs or inputs) // summed
    zeros: jax.Array | float = MIDDLE if form.codes == "int4" else 0
    if codes.zeros is not None:
        zeros = _of_each(codes.zeros, form, outputs)[:, None]
    parts = jnp.pad(sums, ((0, -len(factors) % shared), (0, 0))) if len(factors) % shared else sums
    parts = parts.reshape(-1, shared, outputs)
    totals = jnp.pad(factors.sum(1), (0, -len(factors) % shared)).reshape(-1, shared, 1)
    parts = (parts - zeros * totals) * _of_each(codes.scales, form, outputs)[:, None]
    parts = parts.reshape(-1, outputs)
    return jnp.ones((1, len(parts)), jnp.float32) @ parts


def _values(codes: jax.Array, form: Format) -> jax.Array:
    """What codes, one in each item, stand for before zeros and scales, in float32."""
    if form.codes == "fp4":
        return float8(codes, 9)
    if codes.dtype == jnp.uint8 and form.codes == "fp8":
        return float8(codes, 7)
    return (codes.astype(jnp.int32) if form.codes == "int4" else codes).astype(jnp.float32)
