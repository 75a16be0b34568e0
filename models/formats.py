"""How matrices are stored in fewer bits: as codes, blocks of which share a scale.

A weight is ``(code - zero) * scale``. Codes are converted on their way into a product (:mod:`.product`); no dequantized
copy of a matrix is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

EIGHT_BITS: dict[str, Any] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
"""Name in configurations and flags -> dtype."""

PACKED = 32
"""Inputs of one output whose 4-bit codes lie in 16 bytes: byte i holds those of inputs i (low bits) and 16 + i."""


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
    """Whether every scale has a zero, a number that is subtracted from the codes."""

    @property
    def dtype(self) -> Any:
        """Dtype of the array of codes."""
        return EIGHT_BITS.get(self.codes, jnp.dtype(jnp.uint8))

    @property
    def per_item(self) -> int:
        """Codes in an item of their array."""
        return 1 if self.codes in EIGHT_BITS else 2

    def grid(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Shape of the scales of a matrix with these sizes; the last block along either axis may be smaller."""
        return -(-inputs // (self.inputs or inputs)), -(-outputs // self.outputs)


FORMATS = {"int8": Format("int8"), "fp8": Format("fp8")}
"""Name in configurations and flags -> form into which matrices are brought while a model is loaded."""


def quantize(weight: jax.Array, form: Format) -> tuple[jax.Array, jax.Array]:
    """Quantize a weight ``[…, I, O]`` to 8-bit codes ``[…, I, O]`` and float32 scales ``[…, 1, O]``, symmetric.

    The largest magnitude of an output maps to the largest code. An output of zeros has scale 1.
    """
    whole = jnp.issubdtype(form.dtype, jnp.integer)
    largest = float((jnp.iinfo if whole else jnp.finfo)(form.dtype).max)
    full = weight.astype(jnp.float32)
    scale = jnp.abs(full).max(-2, keepdims=True) / largest
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)  # NaN is kept, so that it shows
    codes = full / scale
    return jnp.clip(jnp.round(codes) if whole else codes, -largest, largest).astype(form.dtype), scale
