"""Our Pallas kernel for products with matrices of experts, and with matrices of fewer bits, on TPUs.

One kernel reads every form. tokamax's grouped products need Python 3.12, leave rows that they do not visit as they find
them, and know neither our packing of 4-bit codes nor blocks of e4m3.

A grid step multiplies one block of rows by a tile of outputs of its expert's matrix, with all inputs, so that a row's
result depends on no other row. All blocks of one expert follow each other, and its tile is copied once for them; codes
are widened once for them, too, in VMEM, since no TPU before the sixth generation multiplies e4m3.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from astraea_jax.models.formats import FP4, MIDDLE, PACKED, Format
from astraea_jax.models.matrix import Matrix, multiply

from .grouped import Blocks, GroupedProduct
from .pallas_tpu import LANES, VMEM_BYTES, Interpret, mxu_product

LEAST_ROWS, MOST_ROWS = 16, 128
"""Rows of a block: those of a tile of bfloat16 in memory, and what keeps the matrix unit busy with each weight."""
TILE_NUMBERS = 2**21
"""Weights of a tile, at most, unless it has 128 outputs; two tiles of codes and a wide one lie in VMEM."""
DOUBLED = sum(int(2 * value) << 4 * code for code, value in enumerate(FP4)) - 2**32
"""The magnitudes of ``fp4``, doubled, in four bits each; as an int32."""
WIDENED_AT_ONCE = 1024
"""Inputs of codes, at most, that are widened in one go, if their groups allow it."""


class GroupedTPU(GroupedProduct):
    """The kernel as a grouped product, and as the product with a single matrix.

    Args:
        interpret: run on a CPU, slowly.
    """

    name = "pallas"

    def __init__(self, interpret: Interpret = False):
        self.interpret = interpret

    def block_rows(self, rows: int, experts: int) -> int:
        """A power of two near the rows that an expert has on average."""
        return min(MOST_ROWS, max(LEAST_ROWS, pl.next_power_of_2(-(-rows // experts))))

    def product(self, x: jax.Array, matrix: Matrix, blocks: Blocks) -> jax.Array:
        """See :meth:`.grouped.GroupedProduct.product`; rows of blocks that are not in use are zero."""
        if matrix.stack is not None:
            first = matrix.stack.layer[...] * len(matrix.weight[...])
            blocks = blocks._replace(experts=blocks.experts + first)
        return _grouped(x, _arrays(matrix), matrix.form, blocks, self.interpret)

    def multiply(self, x: jax.Array, matrix: Matrix) -> jax.Array:
        """Multiply ``x [T, I]`` by a matrix ``[I, O]``: by the kernel if it has a form, else as XLA does."""
        if matrix.form is None:
            return multiply(x, matrix)
        size = self.block_rows(len(x), 1)
        count = -(-len(x) // size)
        index = jnp.int32(0) if matrix.stack is None else matrix.stack.layer[...]
        blocks = Blocks(jnp.full(count, index), jnp.full(count, size), jnp.int32(count))
        padded = jnp.pad(x, ((0, count * size - len(x)), (0, 0)))
        return _grouped(padded, _arrays(matrix), matrix.form, blocks, self.interpret)[: len(x)]


def _arrays(matrix: Matrix) -> list[jax.Array]:
    """Weights or codes ``[n, …, O]`` of all experts and stacked layers, then scales and zeros if any."""
    whole = matrix if matrix.stack is None else matrix.stack.whole
    if whole.form is None:
        arrays = [whole.weight[...]]
    else:
        codes, scales, zeros = whole.codes
        arrays = [codes, _readable(scales)] + ([] if zeros is None else [zeros])
    return [array.reshape(-1, *array.shape[-2:]) for array in arrays]


def _readable(scales: jax.Array) -> jax.Array:
    """Scales in a dtype that TPUs load: not float16, but the same bits."""
    return jax.lax.bitcast_convert_type(scales, jnp.uint16) if scales.dtype == jnp.float16 else scales


def _of_half(bits: jax.Array) -> jax.Array:
    """Float32 of the bits of float16; those below its normal numbers, which TPUs would take for zero, by themselves."""
    wide = bits.astype(jnp.int32)
    magnitude = wide & 0x7FFF
    normal = jax.lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    number = jnp.where(magnitude < 0x400, magnitude.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(wide > 0x7FFF, -number, number)


def _grouped(
    x: jax.Array, arrays: list[jax.Array], form: Format | None, blocks: Blocks, interpret: Interpret
) -> jax.Array:
    """The product; ``arrays`` are weights or codes ``[E, …, O]`` of every expert, then scales and zeros if any."""
    count = len(blocks.experts)
    size, inputs, outputs = len(x) // count, x.shape[1], arrays[0].shape[-1]
    tile = tile_of(inputs, outputs)

    def of_expert(array: jax.Array) -> pl.BlockSpec:
        if array.shape[-1] == outputs:
            return pl.BlockSpec((1, array.shape[1], tile), lambda o, n, experts, used: (experts[n], 0, o))
        return pl.BlockSpec((1, *array.shape[1:]), lambda o, n, experts, used: (experts[n], 0, 0))

    rows = pl.BlockSpec((size, inputs), lambda o, n, experts, used: (jnp.clip(used[0] - 1, 0, n), 0))
    return pl.pallas_call(
        partial(_kernel, form=form),
        out_shape=jax.ShapeDtypeStruct((len(x), outputs), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(outputs, tile), count),
            in_specs=[rows, *map(of_expert, arrays)],
            out_specs=pl.BlockSpec((size, tile), lambda o, n, experts, used: (n, o)),
            scratch_shapes=[] if form is None else [pltpu.VMEM((inputs, tile), x.dtype)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_product",
    )(blocks.experts, blocks.used.reshape(1), x, *arrays)


def tile_of(inputs: int, outputs: int) -> int:
    """Outputs of a tile: a multiple of 128 that wastes few, or all."""
    most = max(1, TILE_NUMBERS // inputs // LANES)
    if outputs <= most * LANES:
        return outputs
    sizes = [LANES * n for n in range(min(2, most), most + 1)]
    return min(sizes, key=lambda size: (-(-outputs // size) * size, -size))


def _kernel(experts: Any, used: Any, x: Any, weight: Any, *rest: Any, form: Format | None) -> None:
    """One block of rows ``x [B, I]`` by a tile of outputs of its expert.

    ``rest`` is scales and zeros if any, then the result ``[B, tile]``, then the scratch for the widened tile if there
    is a ``form``.
    """
    block = pl.program_id(1)
    in_use = block < used[0]
    scale: Any = None
    if form is None:
        (out,) = rest
        wide = weight.at[0]
    else:
        scales, *zeros, out, wide = rest
        first = pl.program_id(0) * out.shape[1]
        scale = partial(_spread, scales, first, form, out.shape[1])

        @pl.when(in_use & ((block == 0) | (experts[block] != experts[jnp.maximum(block - 1, 0)])))
        def widen() -> None:
            zero = partial(_spread, zeros[0], first, form, out.shape[1]) if zeros else None
            _widen(wide, weight, form, None if form.inputs is None else scale, zero)

    @pl.when(in_use)
    def multiply_block() -> None:
        result = mxu_product(x[...], wide[...], 0)
        if form is not None and form.inputs is None:  # a scale of all inputs is one of the sum, too
            result = result * scale(slice(None))
        out[...] = result.astype(out.dtype)

    @pl.when(~in_use)
    def leave_out() -> None:
        out[...] = jnp.zeros_like(out)


def _widen(wide: Any, codes: Any, form: Format, scale: Any, zero: Any) -> None:
    """Put the numbers of a tile of ``codes [1, I / per_item, tile]`` into ``wide [I, tile]``, some inputs at a time.

    ``scale`` and ``zero``, if not None, give those of a slice of groups, ``[groups, tile]``.
    """
    inputs, tile = wide.shape
    group = form.inputs or inputs
    at_once = inputs_at_once(inputs, form)
    for start in range(0, inputs, at_once):
        part = codes[0, start // form.per_item : (start + at_once) // form.per_item]
        values = _decoded(_unpacked(part) if form.per_item == 2 else part, form)
        groups = slice(start // group, -(-(start + at_once) // group))

        def each(of_groups: Any) -> jax.Array:
            of_groups = of_groups(groups)  # noqa: B023
            spread = jnp.broadcast_to(of_groups[:, None], (len(of_groups), group, tile))
            return spread.reshape(-1, tile)[:at_once]

        if zero is not None:
            values = values - each(zero)
        if scale is not None:
            values = values * each(scale)
        wide[start : start + at_once] = values.astype(wide.dtype)


def _decoded(codes: jax.Array, form: Format) -> jax.Array:
    """What codes, one in each item, stand for before zeros and scales, in float32."""
    if form.codes != "fp4":
        values = codes.astype(jnp.float32)
        return values - MIDDLE if form.codes == "int4" and not form.zeros else values
    wide = codes.astype(jnp.int32)
    doubled = jax.lax.shift_right_logical(jnp.int32(DOUBLED), 4 * (wide & 7)) & 15
    return 0.5 * jnp.where(wide > 7, -doubled, doubled).astype(jnp.float32)


def inputs_at_once(inputs: int, form: Format) -> int:
    """Inputs that are widened in one go: whole groups, and whole tiles of codes in memory, or all inputs."""
    step = math.lcm(form.inputs or 1, PACKED * form.per_item)
    most = min(WIDENED_AT_ONCE, inputs) // step
    return next((step * n for n in range(most, 0, -1) if inputs % (step * n) == 0), inputs)


def _unpacked(packed: jax.Array) -> jax.Array:
    """4-bit codes ``[rows, tile]`` in the order of :data:`.formats.PACKED`, as int32 ``[2 * rows, tile]``."""
    both = packed.astype(jnp.int32).reshape(-1, PACKED // 2, packed.shape[1])
    return jnp.concatenate([both & 15, both >> 4], axis=1).reshape(-1, packed.shape[1])


def _spread(grid: Any, first: Any, form: Format, tile: int, groups: slice) -> jax.Array:
    """Scales or zeros of ``groups`` for every output of the tile that begins with output ``first``: float32.

    Those that outputs share are spread by a product with a matrix of ones and zeros, which keeps them as they are:
    a tile cannot begin within the lanes of a register.
    """
    values = grid[0, groups]
    values = _of_half(values) if values.dtype == jnp.uint16 else values.astype(jnp.float32)
    if form.outputs == 1:
        return values
    shape = values.shape[1], tile
    block = (first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)) // form.outputs
    return mxu_product(values, (block == jax.lax.broadcasted_iota(jnp.int32, shape, 0)).astype(jnp.float32), 0)
