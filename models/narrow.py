"""Products of activations with matrices of codes and scales (:mod:`.formats`), in jax.numpy.

On CPUs nothing is widened as a whole. For one row of activations, codes are unpacked, converted, multiplied and summed
in one loop over the matrix; a sum never spans more inputs than share a scale, and is scaled in the same loop. For more
rows a block of outputs at a time is dequantized, small enough to stay in the processor's cache until it has been
multiplied. Other devices have kernels; here the compiler dequantizes the matrix that it multiplies.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .formats import FP4, MIDDLE, PACKED, Format, unpacked
from .product import LANES, blockwise, product

DOUBLED = sum(int(2 * value) << 4 * code for code, value in enumerate(FP4)) - 2**32
"""The magnitudes of ``fp4``, doubled, in four bits each; as an int32."""


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
    if form.inputs is None and form.outputs == 1 and form.per_item == 1 and not form.zeros:
        return product(x, codes.weight) * codes.scales[0].astype(jnp.float32)

    def on_cpu(x: jax.Array, codes: Codes) -> jax.Array:
        x = x.astype(jnp.float32)
        if len(x) == 1 and _loops(x.shape[1], form):
            return _of_one_row(x, codes, form)
        return blockwise(x, codes.weight.shape[1], lambda first, size: of_outputs(codes, form, first, size, x.dtype))

    def elsewhere(x: jax.Array, codes: Codes) -> jax.Array:
        return jnp.dot(x, dequantized(codes, form, x.dtype), preferred_element_type=jnp.float32)

    result: jax.Array = jax.lax.platform_dependent(x, codes, cpu=on_cpu, default=elsewhere)
    return result


def dequantized(codes: Codes, form: Format, dtype: jnp.dtype) -> jax.Array:
    """The weights ``[I, O]``, computed in float32."""
    inputs, outputs = codes.weight.shape[0] * form.per_item, codes.weight.shape[1]
    numbers = decoded(unpacked(codes.weight) if form.per_item == 2 else codes.weight, form)
    if codes.zeros is not None:
        numbers = numbers - _spread(codes.zeros, form.inputs or inputs, form.outputs, inputs, outputs)
    return (numbers * _spread(codes.scales, form.inputs or inputs, form.outputs, inputs, outputs)).astype(dtype)


def of_outputs(codes: Codes, form: Format, first: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """The weights ``[I, size]`` of consecutive outputs."""

    def spread(grid: jax.Array) -> jax.Array:
        by_output = jnp.repeat(grid, form.outputs, axis=1)[:, : codes.weight.shape[1]] if form.outputs > 1 else grid
        return jax.lax.dynamic_slice_in_dim(by_output, first, size, 1)

    weight = jax.lax.dynamic_slice_in_dim(codes.weight, first, size, 1)
    by_output = Codes(weight, spread(codes.scales), None if codes.zeros is None else spread(codes.zeros))
    return dequantized(by_output, Format(form.codes, form.inputs, zeros=form.zeros), dtype)


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
    spread = (form.inputs or inputs) // summed, form.outputs, len(factors), outputs
    zero: jax.Array | float = MIDDLE if form.codes == "int4" else 0
    if codes.zeros is not None:
        zero = _spread(codes.zeros, *spread)
    sums = -zero * factors.sum(1, keepdims=True)
    for i in range(rows.shape[1]):
        if form.per_item == 1:
            sums = sums + factors[:, i, None] * rows[:, i].astype(jnp.float32)
        else:
            low, high = (_values(half, form) for half in (rows[:, i] & 15, rows[:, i] >> 4))
            sums = sums + factors[:, i, None] * low + factors[:, PACKED // 2 + i, None] * high
    return jnp.ones((1, len(factors)), jnp.float32) @ (sums * _spread(codes.scales, *spread))


def _spread(grid: jax.Array, inputs: int, outputs: int, rows: int, columns: int) -> jax.Array:
    """Every number of ``grid`` for each of so many inputs and outputs: ``[rows, columns]`` float32."""
    wide = grid.astype(jnp.float32)
    for axis, (each, size) in enumerate(((inputs, rows), (outputs, columns))):
        if wide.shape[axis] == 1:
            wide = jnp.broadcast_to(wide, [size if a == axis else n for a, n in enumerate(wide.shape)])
        elif each > 1:
            wide = jax.lax.slice_in_dim(jnp.repeat(wide, each, axis=axis), 0, size, axis=axis)
    return wide


def decoded(codes: jax.Array, form: Format) -> jax.Array:
    """What codes stand for before zeros and scales, in float32."""
    values = _values(codes, form)
    return values - MIDDLE if form.codes == "int4" and not form.zeros else values


def _values(codes: jax.Array, form: Format) -> jax.Array:
    """Codes as float32; those of ``fp4`` as the numbers that they stand for."""
    if form.codes != "fp4":
        return codes.astype(jnp.float32)
    wide = codes.astype(jnp.int32)
    doubled = jax.lax.shift_right_logical(jnp.int32(DOUBLED), 4 * (wide & 7)) & 15
    return 0.5 * jnp.where(wide > 7, -doubled, doubled).astype(jnp.float32)
