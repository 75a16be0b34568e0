"""Ragged paged attention in plain jax.numpy: the reference for other backends, and the CPU's kernel.

Pages of one layer are ``[P, 2, K, S, H]``: P pages of S tokens, keys (0) and values (1) apart, heads outermost, so that
the tokens of one head lie together and a page is contiguous. Page 0 is the null page: padding tokens are written there
and nobody reads them. Pages of bfloat16 and float8 are kept as integers of the same bits, since XLA's CPU compiler
would convert a whole pool to float32 to write a few such numbers into it.

Work is proportional to the sum of the contexts in the batch, not to the longest one times the batch: queries are cut
into tiles, tiles are sorted by the number of pages they read, and a few of them at a time, of about the same length, go
through a flash-attention loop (online softmax, arXiv 2205.14135) over the blocks of their contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.models.heads import PLAIN, Heads, Switches

from .backend import Batch, stored
from .tiles import Tiles, cut, most, queries, singles

BLOCK_TOKENS = 128
"""Context tokens per iteration."""
QUERY_TILE = 64
"""Queries of one row in a tile, where rows have more than one; they share what is gathered of their context."""
CHUNK_QUERIES = 128
"""Queries in tiles per iteration."""
CHUNK_ROWS = 16
"""Lone queries per iteration, at most; each has a context of its own."""
BITS = {jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16), jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.uint8)}
"""Dtype of keys and values -> dtype of the pages that hold their bits."""
FLOATS = {bits: dtype for dtype, bits in BITS.items()}

State = tuple[jax.Array, jax.Array, jax.Array]
"""State of the loop over blocks: highest score, sum of weights, weighted values."""


@dataclass(frozen=True)
class Reference:
    """The backend of :func:`write_kv` and :func:`attention`."""

    name = "reference"
    heads_axis = 2

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int, dtype: Any) -> tuple[int, ...]:
        """``(2, K, S, H)``."""
        return (2, kv_heads, page_size, head_dim)

    def page_dtype(self, dtype: Any) -> Any:
        """The integer dtype of :data:`BITS` if ``dtype`` has one, else ``dtype``."""
        return BITS.get(jnp.dtype(dtype), jnp.dtype(dtype))

    def attend(self, heads: Heads, pages: jax.Array, batch: Batch, *, q_tile: int) -> tuple[jax.Array, jax.Array]:
        """:func:`write_kv`, then :func:`attention`."""
        q, k, v = heads.rotated()
        pages = write_kv(pages, k, v, batch.slot_mapping)
        where = batch.page_table, batch.kv_lens, batch.cu_q_lens
        tile = 1 if q_tile == 1 else QUERY_TILE
        out = attention(q, pages, *where, q_tile=tile, scale=heads.scale, switches=heads.switches, sinks=heads.sinks)
        return out, pages


def write_kv(pages: jax.Array, k: jax.Array, v: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    """Store ``k, v [T, K, H]`` at ``slot_mapping [T]`` (page * S + offset) of ``pages [P, 2, K, S, H]``."""
    _, sides, heads, s, _ = pages.shape
    dtype = FLOATS.get(pages.dtype, pages.dtype)
    kv = stored(jnp.stack([k, v], axis=1), dtype)  # [T, 2, K, H]
    if pages.dtype != dtype:
        kv = jax.lax.bitcast_convert_type(kv, pages.dtype)
    page, offset = (slot_mapping // s)[:, None, None], (slot_mapping % s)[:, None, None]
    # With axes joined, XLA would copy the whole pool, there and back, if there is one head.
    return pages.at[page, jnp.arange(sides)[:, None], jnp.arange(heads), offset].set(kv)


def attention(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    *,
    q_tile: int,
    scale: float,
    switches: Switches = PLAIN,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of ragged queries over paged keys and values.

    Args:
        q: ``[T, N, H]`` queries of all rows end to end; the tokens after ``cu_q_lens[-1]`` are padding.
        pages: ``[P, 2, K, S, H]`` pages that already hold the keys and values of this step's tokens.
        page_table: ``[R, M]`` int32, the pages of each row in order.
        kv_lens: ``[R]`` int32, length of each row's context including this step's tokens.
        cu_q_lens: ``[R + 1]`` int32, where each row's queries start; they are the last of its context.
        q_tile: queries of one row per tile; 1 when every row has one query.
        scale: factor on attention scores.
        switches: window and soft cap.
        sinks: ``[N]`` float32, see :class:`~astraea_jax.models.heads.Heads`.

    Returns:
        ``[T, N, H]`` in the dtype of ``q``; rows of padding are zero.
    """
    result = jnp.zeros_like(q)
    attend = partial(_attend_tiles, q, pages, page_table, cu_q_lens, scale=scale, switches=switches, sinks=sinks)
    single = singles(kv_lens, cu_q_lens)
    if q_tile > 1:  # a lone query in a tile would cost as much as a full one
        longer = jnp.where(single.used > 0, 0, kv_lens)
        count = most(q.shape[0], page_table.shape[0], q_tile)
        result = attend(result, cut(longer, cu_q_lens, q_tile, count), q_tile)
    return attend(result, single, 1)


def _attend_tiles(
    q: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    result: jax.Array,
    tiles: Tiles,
    q_tile: int,
    *,
    scale: float,
    switches: Switches,
    sinks: jax.Array | None,
) -> jax.Array:
    """Put the attention of the queries in ``tiles`` into ``result [T, N, H]``; other arguments as :func:`attention`."""
    t, n, h = q.shape
    heads = pages.shape[2]
    at_once = min(CHUNK_ROWS if q_tile == 1 else max(1, CHUNK_QUERIES // q_tile), len(tiles.row))
    order = jnp.argsort(-tiles.reach)
    tiles = Tiles(*(jnp.pad(column[order], (0, -len(order) % at_once)) for column in tiles))
    lane = jnp.arange(q_tile)

    def attend_chunk(i: jax.Array, result: jax.Array) -> jax.Array:
        chunk = Tiles(*(jax.lax.dynamic_slice_in_dim(column, i * at_once, at_once) for column in tiles))
        index = queries(chunk, cu_q_lens, q_tile, t)
        tiled = jnp.take(q, index, axis=0, mode="fill", fill_value=0).astype(jnp.float32) * scale
        tiled = tiled.reshape(at_once, q_tile, heads, -1, h).transpose(0, 2, 3, 1, 4)
        tiled = tiled.reshape(at_once, heads, -1, h)  # [chunk, K, G * q_tile, H]
        q_pos = jnp.where(lane < chunk.used[:, None], chunk.position[:, None] + lane, -1)
        q_pos = jnp.tile(q_pos, (1, n // heads))
        sunk = None if sinks is None else jnp.repeat(sinks.reshape(heads, -1), q_tile, axis=1)  # [K, G * q_tile]
        out = _flash_loop(tiled, pages, page_table[chunk.row], q_pos, chunk, q_tile == 1, switches, sunk)
        out = out.reshape(at_once, heads, -1, q_tile, h).transpose(0, 3, 1, 2, 4).reshape(-1, n, h)
        return result.at[index.reshape(-1)].set(out.astype(q.dtype), mode="drop")

    chunks = -(-jnp.sum(tiles.reach > 0) // at_once)
    return jax.lax.fori_loop(0, chunks, attend_chunk, result)


def _flash_loop(
    q: jax.Array,
    pages: jax.Array,
    table: jax.Array,
    q_pos: jax.Array,
    tiles: Tiles,
    lone: bool,
    switches: Switches,
    sinks: jax.Array | None,
) -> jax.Array:
    """Attend ``q [C, K, G * q_tile, H]``, at ``q_pos [C, G * q_tile]``, to the pages ``table [C, M]``.

    A row reads what its tile reaches, the first row most; with a window, from the page on that the window of the tile's
    first query begins in. ``lone``: q_tile is 1. ``sinks`` are ``[K, G * q_tile]``.
    """
    reach, window, soft_cap = tiles.reach, switches.window, switches.soft_cap
    heads, s = pages.shape[2:4]
    oldest = jnp.maximum(tiles.position - (window or 0) + 1, 0)
    per_block = max(1, BLOCK_TOKENS // s)
    block_tokens = per_block * s
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_block)))
    # The matrices of a single query are too small for a matrix library: fused loops take two thirds of its time.
    scores_of, weigh = (_scores_of_few, _weigh_few) if lone else (_scores_of_many, _weigh_many)

    def visit(block: jax.Array, state: State) -> State:
        top, mass, out = state
        if window is None:
            ids = jax.lax.dynamic_slice_in_dim(table, block * per_block, per_block, 1)
            at_pos = block * block_tokens + jnp.arange(block_tokens)
            inside = at_pos < reach[:, None]
        else:  # every row from the page at which its first window begins
            page = oldest[:, None] // s + block * per_block
            ids = jnp.take_along_axis(table, page + jnp.arange(per_block), axis=1, mode="clip")
            at_pos = page * s + jnp.arange(block_tokens)
            inside = (at_pos < reach[:, None]) & (at_pos >= oldest[:, None])
            at_pos = at_pos[:, None]
        head = ids[:, None] * (2 * heads) + jnp.arange(heads)[:, None]  # [C, K, per_block]
        k, v = (_heads(pages, head + side * heads) for side in (0, 1))
        v = jnp.where(inside[:, None, :, None], v, 0.0)  # values beyond may be NaN, and 0 * NaN is NaN
        scores = scores_of(q, k)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        seen = at_pos <= q_pos[:, :, None]
        if window is not None:
            seen &= at_pos > q_pos[:, :, None] - window
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        higher = jnp.maximum(top, scores.max(-1))
        safe = jnp.where(jnp.isfinite(higher), higher, 0.0)  # for lanes without any token so far
        p = jnp.exp(scores - safe[..., None])
        shrink = jnp.exp(top - safe)
        return higher, mass * shrink + p.sum(-1), out * shrink[..., None] + weigh(p, v)

    start: State = (jnp.full(q.shape[:3], -jnp.inf), jnp.zeros(q.shape[:3]), jnp.zeros(q.shape))
    if sinks is not None:
        start = (jnp.broadcast_to(sinks, q.shape[:3]), jnp.ones(q.shape[:3]), start[2])
    longest = reach[0] if window is None else (reach - oldest // s * s).max()
    _, mass, out = jax.lax.fori_loop(0, -(-longest // block_tokens), visit, start)
    return out / jnp.where(mass == 0, 1.0, mass)[..., None]


def _heads(pages: jax.Array, ids: jax.Array) -> jax.Array:
    """Tokens ``[C, K, B * S, H]`` of the heads ``ids [C, K, B]``, which are numbered over all pages."""
    *_, s, h = pages.shape
    tokens = pages.reshape(-1, s * h)[ids].reshape(*ids.shape[:2], -1, h)
    if pages.dtype in FLOATS:
        tokens = jax.lax.bitcast_convert_type(tokens, FLOATS[pages.dtype])
    return tokens.astype(jnp.float32)


def _scores_of_many(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("CKLH,CKSH->CKLS", q, k)


def _scores_of_few(q: jax.Array, k: jax.Array) -> jax.Array:
    return (q[:, :, :, None] * k[:, :, None]).sum(-1)


def _weigh_many(p: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("CKLS,CKSH->CKLH", p, v)


def _weigh_few(p: jax.Array, v: jax.Array) -> jax.Array:
    return (p[..., None] * v[:, :, None]).sum(-2)
