"""Products with the matrices of experts, and with matrices of fewer bits, on NVIDIA GPUs (:mod:`.triton_products`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.models.config import Activation
from astraea_jax.models.experts import Mixture
from astraea_jax.models.formats import Format
from astraea_jax.models.matrix import Matrix
from astraea_jax.models.narrow import Codes

from .gpu import FP8, FP8_CAPABILITY, Operand, Triton, power_of_two
from .grouped import Blocks, Dispatch, GroupedProduct, dispatch, most_blocks

FEWEST_ROWS, MOST_ROWS, MOST_GROUPED_ROWS = 16, 64, 32
"""Rows of a block: a matrix product takes at least 16, and sums of more would not fit into registers, still less those
of several groups of inputs (:func:`.triton_products.multiply_blocks`)."""

MOST_LAUNCHED = 4096
"""Choices that one launch lays into blocks, each instance looking at all of them."""


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


def smaller(blocks: Blocks, size: int, most: int) -> Blocks:
    """Blocks of ``most`` rows in place of those of ``size`` rows."""
    parts = size // most
    sizes = jnp.clip(blocks.sizes[:, None] - most * jnp.arange(parts), 0, most)
    return Blocks(jnp.repeat(blocks.experts, parts), sizes.reshape(-1), blocks.used * parts)


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
        enough = power_of_two(max(1, 2 * rows // experts))
        return min(MOST_ROWS, max(FEWEST_ROWS, enough))

    def dispatched(self, index: jax.Array, experts: int) -> Dispatch:
        """One launch for few choices, in place of XLA's eight; tokens are undefined in rows that are not in use."""
        size = self.block_rows(index.size, experts)
        if index.size > MOST_LAUNCHED:
            return dispatch(index, experts, size)
        count = most_blocks(index.size, experts, size)
        shapes = {"tokens": count * size, "rows": index.size, "experts": count, "sizes": count}
        tokens, rows, of_blocks, sizes = self.triton.launch(
            "dispatch_choices",
            (experts + 1,),
            {"index": index.reshape(-1)},
            {
                "CHOICES": index.size,
                "CHOSEN": index.shape[1],
                "E": experts,
                "B": size,
                "N": count,
                "BLOCK_CHOICES": power_of_two(max(128, index.size)),  # one for each thread, at least
                "BLOCK_E": power_of_two(experts + 1),
                "BLOCK_N": power_of_two(count),
            },
            out={name: jax.ShapeDtypeStruct((n,), jnp.int32) for name, n in shapes.items()},
        )
        blocks = Blocks(of_blocks, sizes, jnp.sum(sizes > 0, dtype=jnp.int32))
        return Dispatch(blocks, tokens, rows.reshape(index.shape), (index >= 0) & (index < experts))

    def product(self, x: jax.Array, matrix: Matrix, blocks: Blocks) -> jax.Array:
        return self._multiplied(x, *_stored(matrix), blocks, len(x) // len(blocks.experts), len(x))

    def experts(self, x: jax.Array, sent: Dispatch, mixture: Mixture) -> jax.Array:
        rows, blocks = len(sent.tokens), sent.blocks
        size = rows // len(blocks.experts)
        gate = Gate(mixture.block, mixture.activation, mixture.experts.activation_limit)
        gate_up, down = (None if bias is None else bias[...] for bias in (mixture.gate_up_bias, mixture.down_bias))
        to_inner, to_out = _stored(mixture.gate_up), _stored(mixture.down)
        inner = self._multiplied(x, *to_inner, blocks, size, rows, tokens=sent.tokens, bias=gate_up, gate=gate)
        return self._multiplied(inner, *to_out, blocks, size, rows, bias=down)

    def multiplied(self, x: jax.Array, codes: Codes, form: Format) -> jax.Array:
        """Multiply ``x [T, I]`` by one matrix ``[I, O]`` in fewer bits: ``[T, O]`` in the dtype of ``x``."""
        size = self.block_rows(len(x), 4)
        count = -(-len(x) // size)
        left = len(x) - size * jnp.arange(count, dtype=jnp.int32)
        blocks = Blocks(jnp.zeros(count, jnp.int32), jnp.minimum(left, size), jnp.int32(count))
        return self._multiplied(x, codes, form, blocks, size, len(x))

    def _multiplied(
        self,
        x: jax.Array,
        codes: Codes,
        form: Format | None,
        blocks: Blocks,
        size: int,
        rows: int,
        *,
        tokens: jax.Array | None = None,
        bias: jax.Array | None = None,
        gate: Gate | None = None,
    ) -> jax.Array:
        """Launch the kernel for blocks of ``size`` rows: ``[rows, O]``, or features ``[rows, O / 2]``."""
        weight, inputs = codes.weight, x.shape[1]
        if weight.dtype == FP8 and self.triton.capability() < FP8_CAPABILITY:
            weight = jax.lax.bitcast_convert_type(weight, jnp.uint8)
        outputs = weight.shape[-1]
        chosen = self.chosen or tiles(size, x.dtype, weight.dtype)
        step = max(math.gcd(inputs, chosen.inputs), min(32, chosen.inputs))  # whole iterations need no masks
        shared = (form and form.inputs) or 0
        groups = step // math.gcd(shared, step)
        if groups > 1 and size > MOST_GROUPED_ROWS:
            blocks, size = smaller(blocks, size, MOST_GROUPED_ROWS), MOST_GROUPED_ROWS
            chosen = self.chosen or tiles(size, x.dtype, weight.dtype)
        nothing = blocks.sizes  # in place of arrays that are not looked at
        operands: dict[str, Operand] = {
            "x": x,
            "tokens": nothing if tokens is None else tokens,
            "weight": weight,
            "scales": codes.scales,
            "zeros": nothing if codes.zeros is None else codes.zeros,
            "bias": nothing if bias is None else bias,
            "experts": blocks.experts,
            "sizes": blocks.sizes,
        }
        constants = {
            "ROWS": rows,
            "IN": inputs,
            "OUT": outputs,
            "B": size,
            "BLOCK_O": chosen.outputs,
            "BLOCK_I": step // groups,
            "GROUPS": groups,
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


def _stored(matrix: Matrix) -> tuple[Codes, Format | None]:
    """The arrays and the form of a matrix; the scales of one without a form are not looked at."""
    return matrix.codes if matrix.form else Codes(matrix.weight[...], matrix.weight[...], None), matrix.form
