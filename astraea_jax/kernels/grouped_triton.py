"""Products with the matrices of experts, and with matrices of fewer bits, on NVIDIA GPUs (:mod:`.triton_products`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.models.experts import Mixture
from astraea_jax.models.matrix import Matrix
from astraea_jax.models.mlp import Activation

from .gpu import FP8, FP8_CAPABILITY, Operand, Triton
from .grouped import Blocks, Dispatch, GroupedProduct

FEWEST_ROWS, MOST_ROWS = 16, 64
"""Rows of a block: a matrix product takes at least 16, and the sums of more would not fit into registers."""


@dataclass(frozen=True)
class Tiles:
    """What an instance of the kernel multiplies at a time, and how many threads do it. Guessed, not measured yet."""

    outputs: int
    inputs: int
    """Inputs of one iteration."""
    warps: int
    stages: int
    """Iterations whose loads are in flight at once."""


def tiles(rows: int, dtype: Any, stored: Any) -> Tiles:
    """Tiles for blocks of so many rows in ``dtype``, and weights that are ``stored`` in another one or the same.

    For few rows loading the weights dominates the time. Inputs are the same for any number of rows, and so is the order
    of sums. float32 is multiplied without tensor cores.
    """
    if jnp.dtype(dtype).itemsize > 2:
        return Tiles(32, 32, 4, 2)
    inputs = 128 // jnp.dtype(stored).itemsize
    return Tiles(64, inputs, 4, 4) if rows <= 32 else Tiles(128, inputs, 8, 3)


@dataclass(frozen=True)
class Gate:
    """How gate and up projections of one product become features."""

    block: int
    """Features of either in a block."""
    activation: Activation
    limit: float | None
    """See :attr:`astraea_jax.models.config.Experts.activation_limit`."""


@dataclass(frozen=True)
class GroupedTriton(GroupedProduct):
    """The kernel's products: gathering of rows before, bias and activation behind are part of it."""

    triton: Triton
    """Launches it."""
    chosen: Tiles | None = None
    """None: :func:`tiles`."""

    name = "triton"

    def block_rows(self, rows: int, experts: int) -> int:
        """A power of two, twice the rows of an expert on average or more, since a block reads its whole matrix."""
        enough = 1 << max(0, 2 * rows // experts - 1).bit_length()
        return min(MOST_ROWS, max(FEWEST_ROWS, enough))

    def product(self, x: jax.Array, matrix: Matrix, blocks: Blocks) -> jax.Array:
        return self._multiplied(x, matrix, blocks, len(x) // len(blocks.experts), len(x))

    def experts(self, x: jax.Array, sent: Dispatch, mixture: Mixture) -> jax.Array:
        rows, blocks = len(sent.tokens), sent.blocks
        size = rows // len(blocks.experts)
        gate = Gate(mixture.block, mixture.activation, mixture.experts.activation_limit)
        gate_up, down = (bias and bias[...] for bias in (mixture.gate_up_bias, mixture.down_bias))
        inner = self._multiplied(x, mixture.gate_up, blocks, size, rows, tokens=sent.tokens, bias=gate_up, gate=gate)
        return self._multiplied(inner, mixture.down, blocks, size, rows, bias=down)

    def multiplied(self, x: jax.Array, matrix: Matrix) -> jax.Array:
        """Multiply ``x [T, I]`` by one matrix ``[I, O]`` in fewer bits: ``[T, O]`` in the dtype of ``x``."""
        size = self.block_rows(len(x), 4)
        count = -(-len(x) // size)
        left = len(x) - size * jnp.arange(count, dtype=jnp.int32)
        blocks = Blocks(jnp.zeros(count, jnp.int32), jnp.minimum(left, size), jnp.int32(count))
        return self._multiplied(x, matrix, blocks, size, len(x))

    def _multiplied(
        self,
        x: jax.Array,
        matrix: Matrix,
        blocks: Blocks,
        size: int,
        rows: int,
        *,
        tokens: jax.Array | None = None,
        bias: jax.Array | None = None,
        gate: Gate | None = None,
    ) -> jax.Array:
        """Launch the kernel for blocks of ``size`` rows, ``rows`` in all: ``[rows, O]``, or features ``[rows, O / 2]``."""
        form, weight, inputs = matrix.form, matrix.weight[...], x.shape[1]
        if weight.dtype == FP8 and self.triton.capability() < FP8_CAPABILITY:
            weight = jax.lax.bitcast_convert_type(weight, jnp.uint8)
        outputs = weight.shape[-1]
        chosen = self.chosen or tiles(size, x.dtype, weight.dtype)
        shared = (form and form.inputs) or 0
        nothing = blocks.sizes  # in place of arrays that are not looked at
        operands: dict[str, Operand] = {
            "x": x,
            "tokens": nothing if tokens is None else tokens,
            "weight": weight,
            "scales": matrix.scales[...] if form else nothing,
            "zeros": matrix.zeros[...] if form and form.zeros else nothing,
            "bias": nothing if bias is None else bias,
            "experts": blocks.experts,
            "sizes": blocks.sizes,
        }
        constants = {
            "ROWS": rows,
            "I": inputs,
            "O": outputs,
            "B": size,
            "BLOCK_O": chosen.outputs,
            "BLOCK_I": math.gcd(shared, chosen.inputs),
            "STEP": chosen.inputs,
            "CODES": form.codes if form else "",
            "INPUTS": shared,
            "OUTPUTS": form.outputs if form else 1,
            "ZEROS": form is not None and form.zeros,
            "GATHER": tokens is not None,
            "BIAS": bias is not None,
            "JOINED": gate.block if gate else 0,
            "GELU": gate is not None and gate.activation == "gelu",
            "LIMIT": (gate and gate.limit) or 0.0,
            "PRECISION": "ieee" if x.dtype == jnp.float32 else "tf32",
        }
        made = jax.ShapeDtypeStruct((rows, outputs // 2 if gate else outputs), x.dtype)
        (out,) = self.triton.launch(
            "multiply_blocks",
            (len(blocks.sizes), -(-outputs // chosen.outputs)),
            operands,
            constants,
            out={"out": made},
            warps=chosen.warps,
            stages=chosen.stages,
        )
        return out
