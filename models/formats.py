"""How matrices are stored in fewer bits: as codes, blocks of which share a scale.

A weight is ``(code - zero) * scale``. Codes are converted on their way into a product (:mod:`.narrow`); no dequantized
copy of a matrix is stored.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

EIGHT_BITS: dict[str, Any] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
"""Name in configurations and flags -> dtype."""

PACKED = 32
"""Inputs of one output whose 4-bit codes lie in 16 bytes: byte i holds those of inputs i (low bits) and 16 + i."""

MIDDLE = 8
"""What is subtracted from ``int4`` codes that have no zeros."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of ``fp4`` codes 0 to 7; codes 8 to 15 are these, negated."""


ScaleType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Format:
    """Form of a matrix ``[I, O]`` in fewer bits."""

    codes: Literal["int8", "fp8", "int4", "fp4"]
    """``fp8`` is e4m3fn. ``int4`` is 0 to 15, which stands for -8 to 7 where there are no zeros. ``fp4`` is e2m1 of the
    OCP Microscaling formats. 4-bit codes lie as :data:`PACKED` says, in an array ``[I / 2, O]``."""
    inputs: int | None = None
    """Inputs that share a scale; None: all."""
    outputs: int = 1
    """Outputs that share a scale."""
    zeros: bool = False
    """Whether every scale has a zero, an int8 that is subtracted from the codes."""
    scales: ScaleType = "float32"
    """Dtype of the scales."""

    @property
    def dtype(self) -> Any:
        """Dtype of the array of codes."""
        return EIGHT_BITS.get(self.codes, jnp.dtype(jnp.uint8))

    @property
    def per_item(self) -> int:
        """Codes in an item of their array."""
        return 1 if self.codes in EIGHT_BITS else 2

    @property
    def by_output(self) -> bool:
        """Whether an item is a code, and a scale, which has no zero, is that of one output."""
        return self.per_item == 1 and self.inputs is None and self.outputs == 1 and not self.zeros

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a weight with its share of scales and zeros, of a matrix of many inputs."""
        of_scale = jnp.dtype(self.scales).itemsize + self.zeros
        return 1 / self.per_item + (of_scale / (self.inputs * self.outputs) if self.inputs else 0)

    def grid(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Shape of the scales of a matrix with these sizes; the last block along either axis may be smaller."""
        return -(-inputs // (self.inputs or inputs)), -(-outputs // self.outputs)

    def divisible(self, shape: tuple[int, int], devices: int, *, summed: bool) -> bool:
        """Whether each device's part of a matrix of this ``shape [I, O]`` consists of whole blocks that share a scale.

        Devices divide its inputs if it is ``summed``, else its outputs.
        """
        inputs, outputs = shape
        if summed:
            together = math.lcm(self.inputs or 1, PACKED if self.per_item > 1 else 1)
            return inputs % (devices * together) == 0
        return outputs % (devices * self.outputs) == 0

    def fitted(self, inputs: int) -> Format | None:
        """The form for a matrix of so many inputs: with smaller groups if they do not divide it.

        None: it has none, since 4-bit codes lie in blocks of 32 inputs.
        """
        if self.per_item == 1:
            return self
        if inputs % PACKED:
            return None
        return self if self.inputs is None or inputs % self.inputs == 0 else replace(self, inputs=PACKED)


FORMATS = {"int8": Format("int8"), "fp8": Format("fp8"), "int4": Format("int4", 128, scales="bfloat16")}
"""Name in configurations and flags -> form into which matrices are brought while a model is loaded."""

LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0, "fp4": 6.0}
"""Codes -> largest magnitude that they stand for on both sides of zero."""


def quantize(weight: jax.Array, form: Format) -> tuple[jax.Array, jax.Array]:
    """Quantize a weight ``[…, I, O]`` to codes and their scales ``[…, *form.grid(I, O)]``, symmetric.

    The largest magnitude that shares a scale maps to the largest code. Where all are zero, the scale is 1.
    """
    full = weight.astype(jnp.float32)
    inputs, outputs = full.shape[-2:]
    size = form.inputs or inputs, form.outputs
    grid = form.grid(inputs, outputs)
    padding = [(0, 0)] * (full.ndim - 2) + [(0, n * of - x) for n, of, x in zip(grid, size, (inputs, outputs))]
    blocks = jnp.pad(full, padding).reshape(*full.shape[:-2], grid[0], size[0], grid[1], size[1])
    scale = jnp.abs(blocks).max((-3, -1)) / LARGEST[form.codes]
    stored = jnp.finfo(form.scales)
    scale = jnp.where(scale < stored.tiny, 1.0, scale).astype(form.scales)  # NaN is kept, so that it shows
    codes = blocks / scale.astype(jnp.float32)[..., :, None, :, None]
    codes = codes.reshape(*full.shape[:-2], grid[0] * size[0], -1)[..., :inputs, :outputs]
    return _coded(codes, form), scale


def _coded(numbers: jax.Array, form: Format) -> jax.Array:
    """The codes nearest to numbers ``[…, I, O]``."""
    largest = LARGEST[form.codes]
    clipped = jnp.clip(numbers, -largest, largest)
    if form.codes == "fp8":
        return clipped.astype(form.dtype)
    if form.codes == "int8":
        return jnp.round(clipped).astype(form.dtype)
    if form.codes == "int4":
        return packed((jnp.round(clipped) + MIDDLE).astype(jnp.uint8))
    between = [(low + high) / 2 for low, high in itertools.pairwise(FP4)]
    index = sum((jnp.abs(clipped) > border).astype(jnp.uint8) for border in between)
    return packed(jnp.where(clipped < 0, index + 8, index).astype(jnp.uint8))


def packed(codes: Any) -> Any:
    """4-bit codes ``[…, I, O]`` uint8 (NumPy or JAX) in the order of :data:`PACKED`, ``[…, I / 2, O]``."""
    *lead, inputs, outputs = codes.shape
    halves = codes.reshape(*lead, inputs // PACKED, 2, PACKED // 2, outputs)
    return (halves[..., 0, :, :] | halves[..., 1, :, :] << 4).reshape(*lead, inputs // 2, outputs)


def unpacked(stored: jax.Array) -> jax.Array:
    """The inverse of :func:`packed`."""
    *lead, half, outputs = stored.shape
    blocks = stored.reshape(*lead, 2 * half // PACKED, 1, PACKED // 2, outputs)
    both = jnp.concatenate([blocks & 15, blocks >> 4], axis=-3)
    return both.reshape(*lead, 2 * half, outputs)
