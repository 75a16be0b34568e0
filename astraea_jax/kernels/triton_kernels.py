"""Triton kernels of ragged paged attention. They do not depend on JAX, so Triton's interpreter can run them.

Pages of a layer are ``[P, 2, K, S, H]``, as in :mod:`.reference`: the S tokens of a page and head lie together, keys
and values at a constant distance. Grids depend only on the shape of a step, never on its contents; instances without
work return at once.

The G query heads that share a key/value head are the rows of one matrix product. The context of a batch row with one
query is split over several instances, so that few long contexts still fill the GPU, and their results are combined
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The queries of longer rows are cut into
tiles. Both keep an online softmax (arXiv 2205.14135) in powers of two.

Queries, keys and values come as :class:`~astraea_jax.models.heads.Heads` has them, before norm and rotation. A row with
one query needs nobody else's new keys, so :func:`attend_single` does all of it, and a decode step takes two launches
per layer. For longer rows :func:`turn_and_write` goes first, and outputs replace its queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _normed(x, scale, shrink):
    """``x`` times ``shrink``, times the numbers at ``scale``.

    It is rounded after both, but with a scale in float32 at the end only: :func:`astraea_jax.models.heads.rms_norm`.
    """
    shrunk = x.to(tl.float32) * shrink
    if scale.dtype.element_ty != tl.float32:
        shrunk = shrunk.to(x.dtype).to(tl.float32)
    return (shrunk * tl.load(scale).to(tl.float32)).to(x.dtype)


@triton.jit
def _turned(vectors, inside, cos, sin, norm, eps, H: tl.constexpr, NORM: tl.constexpr):
    """Load the vectors of H numbers at ``vectors [M, 1]`` and apply norm and rotation: ``[M, H]``.

    ``cos`` and ``sin`` point to the H / 2 numbers of their token, ``norm`` to the H numbers of the norm's scale.
    """
    h = tl.arange(0, H)
    other = (h + H // 2) % H  # the second number of each pair
    x, y = tl.load(vectors + h, mask=inside, other=0.0), tl.load(vectors + other, mask=inside, other=0.0)
    if NORM:
        f = x.to(tl.float32)
        shrink = tl.rsqrt(tl.sum(f * f, 1) / H + eps)[:, None]
        x, y = _normed(x, norm + h, shrink), _normed(y, norm + other, shrink)
    c, s = tl.load(cos + h % (H // 2)), tl.load(sin + h % (H // 2))
    return (x.to(tl.float32) * c + y.to(tl.float32) * tl.where(h < H // 2, -s, s)).to(x.dtype)


@triton.jit
def _stored(x, dtype: tl.constexpr):
    """Convert numbers to the ``dtype`` of pages; uint8 takes the bits of float8_e4m3fn, for GPUs without that type.

    As in :func:`.backend.stored`, float8 is clipped to its largest number, 448.
    """
    if dtype == tl.uint8 or dtype == tl.float8e4nv:
        x = x.to(tl.float32)
        size = tl.abs(x)
        size = tl.where(size > 448, 448.0, size)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # to the nearest, ties to even
        small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # in steps of 2**-9, the sum's last bit
        value = tl.where(size == size, tl.where(size < 2**-6, small, normal), 0x7F)
        value = (value | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
        return value.to(dtype, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _write(
    key, at, cos, sin, k_norm, eps,
    K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store the key at ``key``, after norm and rotation, at ``at`` of a page, and the value behind it at its place.

    Returns both ``[1, H]`` as they are stored.
    """
    one, h = tl.arange(0, 1)[:, None], tl.arange(0, H)[None, :]
    turned = _turned(key + one, one == 0, cos, sin, k_norm, eps, H, NORM)
    k, v = _stored(turned, at.dtype.element_ty), _stored(tl.load(key + H + h), at.dtype.element_ty)
    tl.store(at + h, k)
    tl.store(at + K * S * H + h, v)
    return k, v


@triton.jit
def turn_and_write(
    qkv, cos, sin, q_norm, k_norm, slot_mapping, pages, q, eps,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK_G: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Put the queries of ``qkv [T, K, G + 2, H]`` into ``q [T, N, H]`` after norm and rotation; write keys and values.

    Grid ``(T, K)``. Tokens go to ``slot_mapping [T]`` of ``pages``, but none to the null page, since nobody reads it.
    """
    token, kv_head = tl.program_id(0), tl.program_id(1)
    head = token * K + kv_head
    cos += token * (H // 2)
    sin += token * (H // 2)
    lane, h = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, H)[None, :]
    queries = _turned(qkv + (head * (G + 2) + lane) * H, lane < G, cos, sin, q_norm, eps, H, NORM)
    tl.store(q + (head * G + lane) * H + h, queries, mask=lane < G)
    slot = tl.load(slot_mapping + token)
    if slot >= S:
        at = pages + (slot // S).to(tl.int64) * (2 * K * S * H) + kv_head * (S * H) + slot % S * H
        _write(qkv + (head * (G + 2) + G) * H, at, cos, sin, k_norm, eps, K, S, H, NORM)


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
def _bent(scores, scale, SOFT_CAP: tl.constexpr):
    """Scale attention scores and apply the soft cap ``cap * tanh(score / cap)``, times log2(e)."""
    if SOFT_CAP > 0:
        bent = 1 - 2 / (tl.exp2(scores * (2 * scale * LOG2E / SOFT_CAP)) + 1)
        return bent * (SOFT_CAP * LOG2E)
    else:
        return scores * (scale * LOG2E)


@triton.jit
def _visit(
    q, q_pos, top, mass, out, head, table, start, end, floor, reach, scale,
    K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend ``q [M, H]`` to context tokens ``[start, end)`` in blocks; update highest score, mass and output.

    ``head`` points to the keys of this key/value head in page 0. Without MASKED every query attends to every token of
    the range, which consists of whole blocks. With MASKED query m attends to tokens up to ``q_pos [M]``, of ``reach``
    tokens that exist. With a WINDOW the page table may hold the null page for tokens before ``floor``.
    """
    h = tl.arange(0, H)
    for at in tl.range(start, end, BLOCK_N):
        pos = at + tl.arange(0, BLOCK_N)
        here = pos < reach
        if WINDOW > 0:
            here &= pos >= floor
        page = tl.load(table + pos // S, mask=here, other=0) if MASKED else tl.load(table + pos // S)
        token = page.to(tl.int64) * (2 * K * S * H) + pos % S * H
        keys, values = head + token[None, :] + h[:, None], head + K * S * H + token[:, None] + h[None, :]
        if MASKED:  # values elsewhere may be NaN, and 0 * NaN is NaN
            k = tl.load(keys, mask=here[None, :], other=0.0)
            v = tl.load(values, mask=here[:, None], other=0.0)
        else:
            k = tl.load(keys)
            v = tl.load(values)
        k, v = _dequantized(k, q.dtype), _dequantized(v, q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION)
        scores = _bent(scores, scale, SOFT_CAP)
        if MASKED:
            seen = (pos[None, :] <= q_pos[:, None]) & here[None, :]
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
def _share(past, splits, least, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Split of the ``past`` tokens before one query: its first block, blocks per instance, and instances with work.

    The first instance has work in any case: the query attends to its own token, too.
    """
    first = 0
    if WINDOW > 0:
        first = tl.maximum(past + 1 - WINDOW, 0) // BLOCK_N
    blocks = tl.cdiv(past, BLOCK_N) - first
    each = tl.maximum(tl.cdiv(blocks, splits), least)
    return first, each, tl.maximum(tl.cdiv(blocks, each), 1)


@triton.jit
def attend_single(
    qkv, cos, sin, q_norm, k_norm, sinks, pages, page_table, kv_lens, cu_q_lens, parts, heights,
    width, splits, least, scale, eps,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Attend rows with one query, a share of the context per instance; grid ``(K, R, splits)``.

    Reads ``qkv [T, K, G + 2, H]``, ``page_table [R, width]``, ``kv_lens [R]`` and ``cu_q_lens [R + 1]``; writes each
    share's output ``parts [R, N, splits, H]`` and the logarithm of its weight ``heights [R, N, splits]``, float32. The
    first instance writes the new key and value, too, and attends to them before they are in memory; and it counts the
    ``sinks [N]``.
    """
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(cu_q_lens + row)
    past = tl.load(kv_lens + row) - 1
    first, each, active = _share(past, splits, least, BLOCK_N, WINDOW)
    if (tl.load(cu_q_lens + row + 1) - token == 1) & (split < active):
        lane, h = tl.arange(0, BLOCK_M), tl.arange(0, H)
        mine = qkv + (token * K + kv_head) * ((G + 2) * H)
        cos += token * (H // 2)
        sin += token * (H // 2)
        queries = _turned(mine + lane[:, None] * H, (lane < G)[:, None], cos, sin, q_norm, eps, H, NORM)
        head, table = pages + kv_head * (S * H), page_table + row * width
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, H], tl.float32)
        if split == 0:
            at = head + tl.load(table + past // S).to(tl.int64) * (2 * K * S * H) + past % S * H
            k, v = _write(mine + G * H, at, cos, sin, k_norm, eps, K, S, H, NORM)
            k, v = _dequantized(k, queries.dtype), _dequantized(v, queries.dtype)
            top = _bent(tl.sum(queries.to(tl.float32) * k.to(tl.float32), 1), scale, SOFT_CAP)
            mass += 1
            out += v.to(tl.float32)
            if SINKS:
                sink = tl.load(sinks + kv_head * G + lane, mask=lane < G, other=0.0) * LOG2E
                higher = tl.maximum(top, sink)
                mass = tl.exp2(top - higher)
                out *= mass[:, None]
                mass += tl.exp2(sink - higher)
                top = higher
        start = (first + split * each) * BLOCK_N
        q_pos = tl.zeros([BLOCK_M], tl.int32) + past
        top, mass, out = _visit(
            queries, q_pos, top, mass, out, head, table,
            start, tl.minimum(start + each * BLOCK_N, past), past + 1 - WINDOW, past, scale,
            K, S, H, BLOCK_N, WINDOW, SOFT_CAP, PRECISION, True,
        )  # fmt: skip
        part = (row * (K * G) + kv_head * G + lane) * splits + split
        tl.store(parts + part[:, None] * H + h[None, :], out * (1 / mass)[:, None], mask=(lane < G)[:, None])
        tl.store(heights + part, top + tl.log2(mass), mask=lane < G)


@triton.jit
def combine(
    kv_lens, cu_q_lens, parts, heights, q, splits, least,
    N: tl.constexpr, H: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    """Combine the shares of :func:`attend_single` into ``q [T, N, H]``; grid ``(N, R)``.

    With DECODE token t belongs to row t, and what belongs to a row without a query becomes 0. Otherwise only rows with
    one query are written.
    """
    n, row = tl.program_id(0), tl.program_id(1)
    h = tl.arange(0, H)
    token = tl.load(cu_q_lens + row)
    if tl.load(cu_q_lens + row + 1) - token == 1:
        _, _, active = _share(tl.load(kv_lens + row) - 1, splits, least, BLOCK_N, WINDOW)
        split = tl.arange(0, BLOCK_SPLITS)
        part = (row * N + n) * splits + split
        height = tl.load(heights + part, mask=split < active, other=float("-inf"))
        weight = tl.exp2(height - tl.max(height, 0))
        share = tl.load(parts + part[:, None] * H + h[None, :], mask=(split < active)[:, None], other=0.0)
        out = tl.sum(share * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(q + (token * N + n) * H + h, out.to(q.dtype.element_ty))
    elif DECODE:
        tl.store(q + (row * N + n) * H + h, tl.zeros([H], q.dtype.element_ty))


@triton.jit
def attend_tiles(
    q, sinks, pages, page_table, kv_lens, cu_q_lens, rows, width, scale,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr, SINKS: tl.constexpr,
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
        if SINKS:
            top = tl.load(sinks + n) * LOG2E
            mass += 1
        out = tl.zeros([BLOCK_M, H], tl.float32)
        head, table = pages + kv_head * (S * H), page_table + row * width
        floor = tl.maximum(past - WINDOW + 1, 0)
        if WINDOW > 0:
            masked_from = floor // BLOCK_N * BLOCK_N
        else:
            masked_from = (past + 1) // BLOCK_N * BLOCK_N
            top, mass, out = _visit(
                queries, q_pos, top, mass, out, head, table, 0, masked_from, 0, masked_from, scale,
                K, S, H, BLOCK_N, WINDOW, SOFT_CAP, PRECISION, False,
            )  # fmt: skip
        top, mass, out = _visit(
            queries, q_pos, top, mass, out, head, table, masked_from, past + used, floor, past + used, scale,
            K, S, H, BLOCK_N, WINDOW, SOFT_CAP, PRECISION, True,
        )  # fmt: skip
        out *= (1 / tl.where(active, mass, 1.0))[:, None]
        tl.store(q + at, out.to(q.dtype.element_ty), mask=active[:, None])
