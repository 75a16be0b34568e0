"""Triton kernels of products with matrices of many experts or one, in any form (:mod:`astraea_jax.models.formats`).

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
    """Numbers of 4-bit codes ``[IN, OUT]``, less ``zero [1, OUT]``.

    With FLOATS they are e2m1, whose bits are those of a float16 with an exponent that is too small by 14.
    """
    if FLOATS:
        half = ((codes & 8).to(tl.uint16) << 12) | ((codes & 7).to(tl.uint16) << 9)
        return half.to(tl.float16, bitcast=True).to(dtype)
    else:
        return (codes.to(tl.float32) - zero).to(dtype)


@triton.jit
def _activated(both, B: tl.constexpr, F: tl.constexpr, GELU: tl.constexpr, LIMIT: tl.constexpr):
    """Gate the up projections ``both[:, F:]`` by ``both[:, :F]``, as :func:`astraea_jax.models.mlp.activated` does."""
    gate, up = tl.split(tl.permute(tl.reshape(both, [B, 2, F]), [0, 2, 1]))
    if LIMIT > 0:
        gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1) * gate * tl.sigmoid(1.702 * gate)
    elif GELU:
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up  # (1 + tanh) / 2
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def _store(out, tile, row, number, ROWS: tl.constexpr, OUT: tl.constexpr):
    """Store a ``tile [B, outputs]``, of this ``number`` along them, in the ``row [B]`` of ``out [ROWS, OUT]``."""
    column = number * tile.shape[1] + tl.arange(0, tile.shape[1])
    mask = (row < ROWS)[:, None] & (column < OUT)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * OUT + column[None, :], tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _columns(tile, OUT: tl.constexpr, BLOCK_O: tl.constexpr, JOINED: tl.constexpr):
    """The outputs of a tile ``[BLOCK_O]``; with JOINED the gates of BLOCK_O / 2 features, then their up projections."""
    place = tl.arange(0, BLOCK_O)
    if JOINED:
        HALF: tl.constexpr = BLOCK_O // 2
        RUN: tl.constexpr = JOINED if JOINED < HALF else HALF
        feature = tile * HALF + place % HALF
        column = feature // JOINED * (2 * JOINED) + place // HALF * JOINED + feature % JOINED
        return tl.max_contiguous(tl.multiple_of(column, RUN), RUN)
    else:
        return tile * BLOCK_O + place


@triton.jit
def _shared(at, inside, otherwise, USED: tl.constexpr):
    """The scales or zeros at ``at`` in float32; ``otherwise``, if there are none."""
    if USED:
        return tl.load(at, mask=inside, other=0.0).to(tl.float32)
    else:
        return otherwise


@triton.jit
def _product(x, some, codes, zero, CODES: tl.constexpr, ZEROS: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply the vectors at ``x`` by the numbers that ``codes`` stand for, of one group of inputs or several."""
    a = tl.load(x, mask=some, other=0.0)
    if (CODES == "int4") | (CODES == "fp4"):
        low = _nibbles(codes & 15, zero, a.dtype, CODES == "fp4")
        high = _nibbles(codes >> 4, zero, a.dtype, CODES == "fp4")
        b = tl.load(x + 16, mask=some, other=0.0)
        return tl.dot(b, high, tl.dot(a, low, input_precision=PRECISION), input_precision=PRECISION)
    elif ZEROS:
        return tl.dot(a, (_dequantized(codes, tl.float32) - zero).to(a.dtype), input_precision=PRECISION)
    else:
        return tl.dot(a, _dequantized(codes, a.dtype), input_precision=PRECISION)


@triton.jit
def multiply_blocks(
    x, tokens, weight, scales, zeros, bias, experts, sizes, out,
    ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUPS: tl.constexpr,
    CODES: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ZEROS: tl.constexpr,
    GATHER: tl.constexpr, BIAS: tl.constexpr,
    JOINED: tl.constexpr, GELU: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply each block of B rows by the matrix of its expert; grid ``(N, cdiv(OUT, BLOCK_O))``.

    Reads ``x [rows, IN]``, whose row is that of ``tokens [N * B]`` with GATHER; ``weight [E, IN, OUT]`` as its form
    CODES stores it ("": its numbers); ``scales`` and ``zeros``, one for INPUTS inputs (0: all) and OUTPUTS outputs;
    ``bias [E, OUT]`` with BIAS; ``experts [N]``; ``sizes [N]``, the rows in use of each block. Writes
    ``out [ROWS, OUT]``, 0 in rows of blocks that are not in use. With JOINED, gate and up projections alternate in
    blocks of so many outputs, and ``out`` is ``[ROWS, OUT / 2]``, activated.

    An iteration of the loop multiplies GROUPS times BLOCK_I inputs; those of a group share scales. Several groups have
    sums of their own, which are added at the end. The scales of an iteration are loaded in the one before it.
    """
    PACKED: tl.constexpr = (CODES == "int4") | (CODES == "fp4")
    PER_ITEM: tl.constexpr = 2 if PACKED else 1
    ITEMS: tl.constexpr = BLOCK_I // PER_ITEM
    STEP: tl.constexpr = GROUPS * BLOCK_I
    EVEN: tl.constexpr = IN % STEP == 0
    WIDTH: tl.constexpr = (OUT + OUTPUTS - 1) // OUTPUTS
    HEIGHT: tl.constexpr = (IN + INPUTS - 1) // INPUTS if INPUTS else 1
    block, tile = tl.program_id(0), tl.program_id(1)
    lane, column = tl.arange(0, B), _columns(tile, OUT, BLOCK_O, JOINED)
    row = block * B + lane
    size = tl.load(sizes + block)
    sums = tl.zeros([B, BLOCK_O], tl.float32)
    if size > 0:
        expert = tl.load(experts + block).to(tl.int64)
        source = tl.load(tokens + row, mask=lane < size, other=0) if GATHER else row
        item = tl.arange(0, ITEMS)
        of_item = item // 16 * 32 + item % 16 if PACKED else item
        if GROUPS > 1:  # axes: groups, then rows or inputs, then inputs or outputs
            group = tl.arange(0, GROUPS)[:, None, None]
            at, inputs = group * ITEMS + item[None, :, None], group * BLOCK_I + of_item[None, None, :]
            source, active, columns = source[None, :, None], (lane < size)[None, :, None], column[None, None, :]
            total = tl.zeros([GROUPS, B, BLOCK_O], tl.float32)
        else:
            group = tl.zeros([1, 1], tl.int32)
            at, inputs = item[:, None], of_item[None, :]
            source, active, columns = source[:, None], (lane < size)[:, None], column[None, :]
            total = sums
        inside = columns < OUT
        vectors = x + source.to(tl.int64) * IN + inputs
        matrix = weight + expert * (IN // PER_ITEM * OUT) + at * OUT + columns
        grid = expert * (HEIGHT * WIDTH) + columns // OUTPUTS
        place = grid + tl.minimum(group, HEIGHT - 1) * WIDTH
        next_zero = _shared(zeros + place, inside, 8.0, ZEROS)
        next_scale = _shared(scales + place, inside, 1.0, CODES != "")
        for start in tl.range(0, IN, STEP):
            zero, scale = next_zero, next_scale
            if INPUTS:
                place = grid + tl.minimum((start + STEP) // INPUTS + group, HEIGHT - 1) * WIDTH
                next_scale = _shared(scales + place, inside, 1.0, True)
                if ZEROS:
                    next_zero = _shared(zeros + place, inside, 8.0, True)
            known, some = inside, active
            if not EVEN:
                known, some = known & (at < (IN - start) // PER_ITEM), some & (inputs < IN - start)
            w = tl.load(matrix + start // PER_ITEM * OUT, mask=known, other=0.0)
            product = _product(vectors + start, some, w, zero, CODES, ZEROS, PRECISION)
            total += product * scale if INPUTS else product
        sums = tl.sum(total, 0) if GROUPS > 1 else total
        if CODES != "" and not INPUTS:
            sums *= next_scale
        if CODES == "fp4":
            sums *= FP4_UNIT
        if BIAS:
            sums += tl.load(bias + expert * OUT + column, mask=column < OUT, other=0.0).to(tl.float32)[None, :]
    if JOINED:
        _store(out, _activated(sums, B, BLOCK_O // 2, GELU, LIMIT), row, tile, ROWS, OUT // 2)
    else:
        _store(out, sums, row, tile, ROWS, OUT)


@triton.jit
def dispatch_choices(
    index, tokens, rows, experts, sizes,
    CHOICES: tl.constexpr, CHOSEN: tl.constexpr, E: tl.constexpr, B: tl.constexpr, N: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Lay choices into blocks of B rows as :func:`.grouped.dispatch` does; grid ``(E + 1,)``, the last for the rest.

    Reads ``index [CHOICES]``, of CHOSEN experts for each token; fills ``tokens [N * B]`` where rows are in use,
    ``rows [CHOICES]``, ``experts [N]`` and ``sizes [N]``. Every instance counts all choices.
    """
    expert = tl.program_id(0)
    i, bin, block = tl.arange(0, BLOCK_CHOICES), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    choice = tl.load(index + i, mask=i < CHOICES, other=E)
    choice = tl.where((choice >= 0) & (choice < E), choice, E)
    counts = tl.histogram(choice, BLOCK_E)
    needed = tl.where(bin < E, (counts + B - 1) // B, 0)
    start = tl.sum(tl.where(bin < expert, needed, 0), 0)
    mine = (choice == expert) & (i < CHOICES)
    if expert < E:
        count = tl.sum(tl.where(bin == expert, counts, 0), 0)
        row = start * B + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(tokens + row, i // CHOSEN, mask=mine)
        tl.store(rows + i, row, mask=mine)
        left = count - block * B
        tl.store(experts + start + block, expert + 0 * block, mask=left > 0)
        tl.store(sizes + start + block, tl.minimum(left, B), mask=left > 0)
    else:
        tl.store(rows + i, 0 * i, mask=mine)
        tl.store(experts + start + block, 0 * block, mask=start + block < N)
        tl.store(sizes + start + block, 0 * block, mask=start + block < N)
