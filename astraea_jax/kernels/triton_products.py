"""A Triton kernel of products with matrices of many experts, or of one, in any form (:mod:`astraea_jax.models.formats`).

An instance multiplies B rows by a tile of one matrix: so an expert that no row chose is never read, and few rows take
as long as reading the matrices that they need. Codes become numbers in registers, on their way from memory into the
product; a scale is applied to the sum over the inputs that share it, in float32. The order of a sum depends on the
matrix only, never on the rows of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _dequantized

FP4_UNIT = tl.constexpr(16384.0)
"""What 4-bit floats are multiplied by after :func:`_nibbles`."""


@triton.jit
def _nibbles(codes, zero, dtype: tl.constexpr, FLOATS: tl.constexpr):
    """Numbers of 4-bit codes ``[I, O]``, less ``zero [1, O]``.

    With FLOATS they are e2m1, whose bits are those of a float16 with an exponent that is too small by 14.
    """
    if FLOATS:
        half = ((codes & 8).to(tl.uint16) << 12) | ((codes & 7).to(tl.uint16) << 9)
        return half.to(tl.float16, bitcast=True).to(dtype)
    else:
        return (codes.to(tl.float32) - zero).to(dtype)


@triton.jit
def _activated(both, B: tl.constexpr, F: tl.constexpr, GELU: tl.constexpr, LIMIT: tl.constexpr):
    """Gate projections ``both[:, :F]`` times up projections ``both[:, F:]``, as :func:`astraea_jax.models.mlp.activated`."""
    gate, up = tl.split(tl.permute(tl.reshape(both, [B, 2, F]), [0, 2, 1]))
    if LIMIT > 0:
        gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1) * gate * tl.sigmoid(1.702 * gate)
    elif GELU:
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def multiply_blocks(
    x, tokens, weight, scales, zeros, bias, experts, sizes, out,
    ROWS: tl.constexpr, I: tl.constexpr, O: tl.constexpr,
    B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, STEP: tl.constexpr,
    CODES: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ZEROS: tl.constexpr,
    GATHER: tl.constexpr, BIAS: tl.constexpr,
    JOINED: tl.constexpr, GELU: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply each block of B rows by the matrix of its expert; grid ``(N, cdiv(O, BLOCK_O))``.

    Reads ``x [rows, I]``, whose row is that of ``tokens [N * B]`` with GATHER; ``weight [E, I, O]`` as its form CODES
    stores it ("": its numbers); ``scales`` and ``zeros``, one for INPUTS inputs (0: all) and OUTPUTS outputs;
    ``bias [E, O]`` with BIAS; ``experts [N]``; ``sizes [N]``, the rows in use of each block. Writes ``out [ROWS, O]``,
    0 in rows of blocks that are not in use. With JOINED, gate and up projections alternate in blocks of so many
    outputs, and ``out`` is ``[ROWS, O / 2]``, activated.

    BLOCK_I inputs, which share scales, are multiplied at once, STEP in an iteration of the loop.
    """
    PACKED: tl.constexpr = (CODES == "int4") | (CODES == "fp4")
    ITEMS: tl.constexpr = BLOCK_I // 2 if PACKED else BLOCK_I
    WIDTH: tl.constexpr = (O + OUTPUTS - 1) // OUTPUTS
    SCALES: tl.constexpr = ((I + INPUTS - 1) // INPUTS if INPUTS else 1) * WIDTH
    block, tile = tl.program_id(0), tl.program_id(1)
    lane, place = tl.arange(0, B), tl.arange(0, BLOCK_O)
    if JOINED:  # a tile has the gates of its features, then their up projections
        feature = tile * (BLOCK_O // 2) + place % (BLOCK_O // 2)
        column = feature // JOINED * (2 * JOINED) + place // (BLOCK_O // 2) * JOINED + feature % JOINED
    else:
        column = tile * BLOCK_O + place
    inside = column < O
    row = block * B + lane
    size = tl.load(sizes + block)
    total = tl.zeros([B, BLOCK_O], tl.float32)
    if size > 0:
        active = lane < size
        expert = tl.load(experts + block).to(tl.int64)
        source = tl.load(tokens + row, mask=active, other=0) if GATHER else row
        vectors = x + source.to(tl.int64)[:, None] * I
        item = tl.arange(0, ITEMS)
        matrix = weight + expert * (I * O // 2 if PACKED else I * O) + column[None, :]
        grid = expert * SCALES + column // OUTPUTS
        for start in tl.range(0, I, STEP):
            for part in tl.static_range(STEP // BLOCK_I):
                first = start + part * BLOCK_I
                at = (first // 2 if PACKED else first) + item
                known = inside[None, :]
                if I % STEP != 0:
                    known &= (at < (I // 2 if PACKED else I))[:, None]
                w = tl.load(matrix + at[:, None] * O, mask=known, other=0.0)
                if INPUTS:
                    shared = grid + first // INPUTS * WIDTH
                    here = inside if I % STEP == 0 else inside & (shared < (expert + 1) * SCALES)
                    scale = tl.load(scales + shared, mask=here, other=0.0).to(tl.float32)
                    zero = tl.load(zeros + shared, mask=here, other=0).to(tl.float32)[None, :] if ZEROS else 8.0
                else:
                    zero = tl.load(zeros + grid, mask=inside, other=0).to(tl.float32)[None, :] if ZEROS else 8.0
                if PACKED:
                    low = first + item // 16 * 32 + item % 16
                    some = active[:, None] if I % STEP == 0 else active[:, None] & (low < I)[None, :]
                    a = tl.load(vectors + low[None, :], mask=some, other=0.0)
                    b = tl.load(vectors + low[None, :] + 16, mask=some, other=0.0)
                    product = tl.dot(a, _nibbles(w & 15, zero, a.dtype, CODES == "fp4"), input_precision=PRECISION)
                    high = _nibbles(w >> 4, zero, a.dtype, CODES == "fp4")
                    product = tl.dot(b, high, product, input_precision=PRECISION)
                else:
                    some = active[:, None] if I % STEP == 0 else active[:, None] & (at < I)[None, :]
                    a = tl.load(vectors + at[None, :], mask=some, other=0.0)
                    numbers = _dequantized(w, tl.float32) - zero if ZEROS else _dequantized(w, a.dtype)
                    product = tl.dot(a, numbers.to(a.dtype), input_precision=PRECISION)
                total += product * scale[None, :] if INPUTS else product
        if CODES != "" and not INPUTS:
            total *= tl.load(scales + grid, mask=inside, other=0.0).to(tl.float32)[None, :]
        if CODES == "fp4":
            total *= FP4_UNIT
        if BIAS:
            total += tl.load(bias + expert * O + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if JOINED:
        feature = tile * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
        made = _activated(total, B, BLOCK_O // 2, GELU, LIMIT).to(out.dtype.element_ty)
        tl.store(
            out + row[:, None] * (O // 2) + feature[None, :],
            made,
            mask=(row < ROWS)[:, None] & (feature < O // 2)[None, :],
        )
    else:
        mask = (row < ROWS)[:, None] & inside[None, :]
        tl.store(out + row[:, None] * O + column[None, :], total.to(out.dtype.element_ty), mask=mask)
