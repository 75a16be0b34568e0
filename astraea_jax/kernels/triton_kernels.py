"""Triton kernels of ragged paged attention. They do not depend on JAX, so Triton's interpreter can run them.

Pages of a layer are ``[P, 2, K, S, H]``, as in :mod:`.reference`: the S tokens of a page and head lie together, keys
and values at a constant distance. Grids depend only on the shape of a step, never on its contents; instances without
work return at once.

The G query heads that share a key/value head are the rows of one matrix product. The context of a batch row with one
query is split over several instances, so that few long contexts still fill the GPU, and their results are combined
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The queries of longer rows are cut into
tiles. Both keep an online softmax (arXiv 2205.14135) in powers of two.

Outputs replace the queries: an instance writes only where it, or an earlier kernel of the stream, has read; padding
tokens keep their values.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def write_kv(
    k, v, slot_mapping, pages, K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Store ``k, v [T, K, H]`` at ``slot_mapping [T]`` of ``pages``; grid ``(T, K * H / BLOCK)``.

    The null page is not written, since nobody reads it.
    """
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token)
    if slot >= S:
        lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = lane < K * H
        key = tl.load(k + token * (K * H) + lane, mask=inside)
        value = tl.load(v + token * (K * H) + lane, mask=inside)
        at = pages + (slot // S).to(tl.int64) * (2 * K * S * H) + lane // H * (S * H) + slot % S * H + lane % H
        tl.store(at, key, mask=inside)
        tl.store(at + K * S * H, value, mask=inside)


@triton.jit
def _dequantized(x, dtype: tl.constexpr):
    """Convert numbers of a page to ``dtype``; uint8 holds the bits of float8_e4m3fn, for GPUs without that type.

    Its bits are those of a float16 whose exponent is too small by 8; NaN (0x7f) is the exception.
    """
    if x.dtype == tl.uint8:
        half = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256
        x = tl.where((x & 0x7F) == 0x7F, float("nan"), value)
    return x.to(dtype)


@triton.jit
def _visit(
    q, q_pos, top, mass, out, head, table, start, end, reach, scale,
    K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend ``q [M, H]`` to context tokens ``[start, end)`` in blocks; update highest score, mass and output.

    ``head`` points to the keys of this key/value head in page 0. Without MASKED every query attends to every token of
    the range, which consists of whole blocks. With MASKED query m attends to tokens up to ``q_pos [M]``, of ``reach``
    tokens that exist.
    """
    h = tl.arange(0, H)
    for at in tl.range(start, end, BLOCK_N):
        pos = at + tl.arange(0, BLOCK_N)
        page = tl.load(table + pos // S, mask=pos < reach, other=0) if MASKED else tl.load(table + pos // S)
        token = page.to(tl.int64) * (2 * K * S * H) + pos % S * H
        keys, values = head + token[None, :] + h[:, None], head + K * S * H + token[:, None] + h[None, :]
        if MASKED:  # values beyond may be NaN, and 0 * NaN is NaN
            k = tl.load(keys, mask=(pos < reach)[None, :], other=0.0)
            v = tl.load(values, mask=(pos < reach)[:, None], other=0.0)
        else:
            k = tl.load(keys)
            v = tl.load(values)
        k, v = _dequantized(k, q.dtype), _dequantized(v, q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if SOFT_CAP > 0:  # cap * tanh(score / cap)
            bent = 1 - 2 / (tl.exp2(scores * (2 * scale * LOG2E / SOFT_CAP)) + 1)
            scores = bent * (SOFT_CAP * LOG2E)
        else:
            scores *= scale * LOG2E
        if MASKED:
            seen = pos[None, :] <= q_pos[:, None]
            if WINDOW > 0:
                seen &= pos[None, :] > q_pos[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # for queries without any token so far
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        mass = mass * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(q.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        top = higher
    return top, mass, out


@triton.jit
def _share(kv_len, splits, least, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Split of one query's context: its first block, blocks per instance, and instances with work."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0) // BLOCK_N
    blocks = tl.cdiv(kv_len, BLOCK_N) - first
    each = tl.maximum(tl.cdiv(blocks, splits), least)
    return first, each, tl.cdiv(blocks, each)


@triton.jit
def attend_single(
    q, pages, page_table, kv_lens, cu_q_lens, parts, heights, width, splits, least, scale,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend rows with one query, a share of the context per instance; grid ``(K, R, splits)``.

    Reads ``q [T, N, H]``, ``page_table [R, width]``, ``kv_lens [R]`` and ``cu_q_lens [R + 1]``; writes each share's
    output ``parts [R, N, splits, H]`` and the logarithm of its weight ``heights [R, N, splits]``, float32.
    """
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(cu_q_lens + row)
    kv_len = tl.load(kv_lens + row)
    first, each, active = _share(kv_len, splits, least, BLOCK_N, WINDOW)
    if (tl.load(cu_q_lens + row + 1) - token == 1) & (split < active):
        lane, h = tl.arange(0, BLOCK_M), tl.arange(0, H)
        n = kv_head * G + lane
        queries = tl.load(q + (token * (K * G) + n)[:, None] * H + h[None, :], mask=(lane < G)[:, None], other=0.0)
        start = (first + split * each) * BLOCK_N
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, H], tl.float32)
        q_pos = tl.zeros([BLOCK_M], tl.int32) + kv_len - 1
        top, mass, out = _visit(
            queries, q_pos, top, mass, out, pages + kv_head * (S * H), page_table + row * width,
            start, tl.minimum(start + each * BLOCK_N, kv_len), kv_len, scale,
            K, S, H, BLOCK_N, WINDOW, SOFT_CAP, PRECISION, True,
        )  # fmt: skip
        part = (row * (K * G) + n) * splits + split
        tl.store(parts + part[:, None] * H + h[None, :], out * (1 / mass)[:, None], mask=(lane < G)[:, None])
        tl.store(heights + part, top + tl.log2(mass), mask=lane < G)


@triton.jit
def combine(
    q, kv_lens, cu_q_lens, parts, heights, splits, least,
    N: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Combine the shares of :func:`attend_single` into ``q [T, N, H]``, in place; grid ``(N, R)``."""
    n, row = tl.program_id(0), tl.program_id(1)
    token = tl.load(cu_q_lens + row)
    _, _, active = _share(tl.load(kv_lens + row), splits, least, BLOCK_N, WINDOW)
    if tl.load(cu_q_lens + row + 1) - token == 1:
        split, h = tl.arange(0, BLOCK_SPLITS), tl.arange(0, H)
        part = (row * N + n) * splits + split
        height = tl.load(heights + part, mask=split < active, other=float("-inf"))
        weight = tl.exp2(height - tl.max(height, 0))
        share = tl.load(parts + part[:, None] * H + h[None, :], mask=(split < active)[:, None], other=0.0)
        out = tl.sum(share * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(q + (token * N + n) * H + h, out.to(q.dtype.element_ty))


@triton.jit
def attend_tiles(
    q, pages, page_table, kv_lens, cu_q_lens, rows, width, scale,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend rows with two queries or more, in place of ``q [T, N, H]``; grid ``(K, T // B + R)``, B = BLOCK_M // G.

    Row r's tiles of B queries are numbered from ``cu_q_lens[r] // B + r``, which leaves enough numbers for every row.
    Later tiles attend to longer contexts, so they start first.
    """
    tokens_of_tile: tl.constexpr = BLOCK_M // G
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    low, high = 0, rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_q_lens + middle) // tokens_of_tile + middle <= tile:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    start = tl.load(cu_q_lens + row)
    q_len = tl.load(cu_q_lens + row + 1) - start
    kv_len = tl.load(kv_lens + row)
    first = (tile - start // tokens_of_tile - row) * tokens_of_tile
    used = tl.minimum(q_len - first, tokens_of_tile)
    if (q_len > 1) & (used > 0):
        lane, h = tl.arange(0, BLOCK_M), tl.arange(0, H)
        query = lane // G
        active = query < used
        n = kv_head * G + lane % G
        at = ((start + first + query) * (K * G) + n)[:, None] * H + h[None, :]
        queries = tl.load(q + at, mask=active[:, None], other=0.0)
        past = kv_len - q_len + first  # tokens before the tile's first query
        q_pos = tl.where(active, past + query, -1)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, H], tl.float32)
        head, table = pages + kv_head * (S * H), page_table + row * width
        if WINDOW > 0:
            masked_from = tl.maximum(past - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        else:
            masked_from = (past + 1) // BLOCK_N * BLOCK_N
            top, mass, out = _visit(
                queries, q_pos, top, mass, out, head, table, 0, masked_from, masked_from, scale,
                K, S, H, BLOCK_N, WINDOW, SOFT_CAP, PRECISION, False,
            )  # fmt: skip
        top, mass, out = _visit(
            queries, q_pos, top, mass, out, head, table, masked_from, past + used, past + used, scale,
            K, S, H, BLOCK_N, WINDOW, SOFT_CAP, PRECISION, True,
        )  # fmt: skip
        out *= (1 / tl.where(active, mass, 1.0))[:, None]
        tl.store(q + at, out.to(q.dtype.element_ty), mask=active[:, None])
