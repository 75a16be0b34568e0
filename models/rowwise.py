"""Products on CPUs whose rows depend on no other row, bit for bit, and not on how many there are.

XLA's product of one row sums in the order of the inputs, and so does that of 64 rows and more if it has at most 512
inputs and outputs in multiples of 64. Between these XLA splits the sum, in ways that depend on all sizes. So inputs are
multiplied in blocks of equal size, whose products are added in their order, and few rows one at a time.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from .product import product, widened

TILE, MORE = 64, 32
"""The fewest rows that are multiplied at once, and how many more the next larger product has, at least."""
ALONE = 12
"""Rows up to which one at a time is faster than :data:`TILE` at once."""
DEPTH = 512
"""Inputs that are summed at once, at most."""
WIDTH = 64
"""Outputs are padded to a multiple of it."""


def rowwise(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply ``x [T, I]`` by ``weight [I, O]``: ``[T, O]`` float32; as :func:`.product.product` but on CPUs."""

    def on_cpu(x: jax.Array, weight: jax.Array) -> jax.Array:
        x, wide = x.astype(jnp.float32), widened(weight)
        few = len(x) < TILE
        return first_rows(x, wide, jnp.int32(len(x))) if few else _at_once(*_blocks(x, wide))[:, : weight.shape[1]]

    result: jax.Array = jax.lax.platform_dependent(x, weight, cpu=on_cpu, default=product)
    return result


def first_rows(x: jax.Array, weight: jax.Array, used: jax.Array) -> jax.Array:
    """Multiply the first ``used`` rows of ``x [B, I]`` by ``weight [I, O]``, both float32: ``[B, O]``.

    What it returns for other rows is finite if these are.
    """
    rows, outputs = len(x), weight.shape[1]
    x, weight = _blocks(x, weight)
    out = jnp.zeros((rows, weight.shape[-1]), jnp.float32)

    def one(i: jax.Array, out: jax.Array) -> jax.Array:
        row = _at_once(jax.lax.dynamic_slice_in_dim(x, i, 1, 1), weight)
        return jax.lax.dynamic_update_slice_in_dim(out, row, i, 0)

    def alone() -> jax.Array:
        return jax.lax.fori_loop(0, used, one, out)

    def at_once(size: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(out, _at_once(x[:, :size], weight), 0, 0)

    if rows < TILE:
        result = _at_once(x, weight) if rows == 1 else alone()
    else:
        more = max(MORE, rows // 8)
        sizes = [*range(TILE, rows, more), rows]
        which = jnp.where(used <= ALONE, 0, 1 + jnp.maximum(0, -(-(used - TILE) // more)))
        result = jax.lax.switch(which, [alone, *(partial(at_once, n) for n in sizes)])
    return result[:, :outputs]


def _blocks(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``x [B, I]`` and ``weight [I, O]`` by blocks of inputs: ``[S, B, I / S]`` and ``[S, I / S, O]``, padded."""
    inputs, outputs = weight.shape
    depth = next(n for n in range(min(DEPTH, inputs), 0, -1) if inputs % n == 0)
    padded = jnp.pad(weight, ((0, 0), (0, -outputs % WIDTH)))
    return x.reshape(len(x), -1, depth).swapaxes(0, 1), padded.reshape(-1, depth, padded.shape[1])


def _at_once(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x [S, B, I / S]`` times ``weight [S, I / S, O]``, summed over S in order; one row, or at least :data:`TILE`."""
    # The barrier keeps XLA from giving product and sum to its library together, which would sum in another order.
    parts = jax.lax.optimization_barrier(jax.lax.dot_general(x, weight, (((2,), (1,)), ((0,), (0,)))))
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out
