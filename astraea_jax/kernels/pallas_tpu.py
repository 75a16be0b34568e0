"""Our own Pallas kernels for TPUs: a paged write and ragged paged flash attention, for decode and prefill alike.

The published kernels reshape and bitcast refs, which no interpreter supports, so they cannot run without a TPU. These
only index refs and reshape values, so the tests run them on a CPU, with a race detector and poisoned memory.

Pages of a layer are ``[P, 2, K, S, H]`` as in :mod:`.reference`, and one copy brings a whole page. Heads are padded to
a multiple of the 128 lanes of a TPU's registers. Where two fit (``H <= 64``) a page is ``[1, K, S, 128]``, keys in the
lower lanes and values in the upper, so nothing is wasted at 64: queries are zero in the upper lanes, and only the
upper lanes of the weighted sum are kept.

Attention (online softmax, arXiv 2205.14135) takes one grid step per tile of queries of one row. Pages are copied in
blocks into two buffers: the next block is copied while the kernel computes with the current one, across tiles, too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from astraea_jax.errors import StartupError
from astraea_jax.models.heads import PLAIN, Heads, Switches

from .backend import Batch, stored
from .tiles import cut, most, queries

LANES = 128
SUBLANES = 8
BLOCK_TOKENS = 256
"""Context tokens per buffer, if they fit into BUFFER_BYTES."""
BUFFER_BYTES = 2 * 2**20
"""Largest size of each of the two page buffers in VMEM."""
VMEM_BYTES = 64 * 2**20
"""VMEM that the compiler may use: half of the smallest among v5e, v5p and v6e, and all of a tpu7x core's."""
SMEM_BYTES = 900 * 2**10
"""Share of the 1 MiB of scalar memory that the page table may take."""
NEVER = -1e30
"""Attention score of a masked token; finite, so that differences of scores are finite."""

Interpret = bool | pltpu.InterpretParams

_START: Callable[[Any], None] = operator.methodcaller("start")
_WAIT: Callable[[Any], None] = operator.methodcaller("wait")


class PallasTPU:
    """The backend of :func:`write_kv` and :func:`attention`.

    Args:
        interpret: run on a CPU, slowly.
    """

    name = "pallas"
    heads_axis = 2
    has_sinks = True

    def __init__(self, interpret: Interpret = False):
        self.interpret = interpret

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int, dtype: Any) -> tuple[int, ...]:
        """``(2, K, S, lanes)``, or ``(1, K, S, 128)`` where a key and a value share the lanes.

        Raises:
            StartupError: the kernels do not support ``dtype``, or pages of this size.
        """
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn):
            raise StartupError(
                f"attention {self.name!r} keeps bfloat16, float32 and float8, not {jnp.dtype(dtype).name}"
            )
        if not self.interpret and page_size % SUBLANES:
            raise StartupError(
                f"attention {self.name!r} needs pages of a multiple of {SUBLANES} tokens, not {page_size}"
            )
        return (1 if _shared(head_dim) else 2, kv_heads, page_size, -(-head_dim // LANES) * LANES)

    def page_dtype(self, dtype: Any) -> Any:
        """Return ``dtype``: pages hold the numbers themselves."""
        return jnp.dtype(dtype)

    def attend(self, heads: Heads, pages: jax.Array, batch: Batch, *, q_tile: int) -> tuple[jax.Array, jax.Array]:
        """:func:`write_kv`, then :func:`attention`."""
        q, k, v = heads.rotated()
        check_page_table(batch)
        pages = write_kv(pages, k, v, batch, decode=q_tile == 1, interpret=self.interpret)
        attend = partial(attention, scale=heads.scale, switches=heads.switches, sinks=heads.sinks)
        return attend(q, pages, batch, q_tile=q_tile, interpret=self.interpret), pages


class PallasInterpreted(PallasTPU):
    """:class:`PallasTPU` interpreted on any device, many times slower, to check its results."""

    name = "pallas-interpreted"

    def __init__(self) -> None:
        super().__init__(interpret=True)


def check_page_table(batch: Batch) -> None:
    """Refuse a page table that does not fit into scalar memory, where the kernels for TPUs keep it.

    Raises:
        StartupError: the table is too large; the message says which options to change.
    """
    rows, width = batch.page_table.shape
    if 4 * rows * width > SMEM_BYTES:
        raise StartupError(
            f"a page table of {rows} rows and {width} pages takes {4 * rows * width // 1024} KiB of scalar memory, of "
            f"which the TPU has {SMEM_BYTES // 1024}; raise page_size, or lower max_context or max_seqs"
        )


def write_kv(
    pages: jax.Array, k: jax.Array, v: jax.Array, batch: Batch, *, decode: bool, interpret: Interpret = False
) -> jax.Array:
    """Append ``k, v [T, K, H]`` to the contexts of their rows, in place: their pages are read, changed and written.

    A single token cannot be written, since in memory it shares its tile of 8 rows with others. Padding changes no page.

    Args:
        pages: ``[P, sides, K, S, lanes]``; the compiled caller should donate them.
        k: keys.
        v: values.
        batch: where the tokens are in the pages.
        decode: every row has at most one token, and token t belongs to row t.
        interpret: see :class:`PallasTPU`.
    """
    _, sides, heads, s, lanes = pages.shape
    rows = batch.kv_lens.shape[0]
    new = stored(_in_lanes(k, v, lanes), pages.dtype)  # [T, sides, K, lanes]
    past = batch.kv_lens - (batch.cu_q_lens[1:] - batch.cu_q_lens[:-1])
    if decode:
        row = jnp.arange(rows)
        nth = past // s
        new = new[:, :, :, None]
    else:
        touched = jnp.where(batch.kv_lens > past, (batch.kv_lens - 1) // s - past // s + 1, 0)
        ends = jnp.cumsum(touched)
        item = jnp.arange(min(k.shape[0], (k.shape[0] + 2 * rows * (s - 1)) // s))  # the most that can be touched
        row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), rows - 1)
        nth = jnp.where(item < ends[-1], past[row] // s + item - (ends - touched)[row], -1)  # -1: none of the row's
        token = (batch.cu_q_lens[row] - past[row] + nth * s)[:, None] + jnp.arange(s)
        new = new[jnp.clip(token, 0, k.shape[0] - 1)].transpose(0, 2, 3, 1, 4)  # [items, sides, K, S, lanes]
    low = jnp.clip(past[row] - nth * s, 0, s)
    high = jnp.clip(batch.kv_lens[row] - nth * s, 0, s) * (nth >= 0)
    page = jnp.where(low < high, batch.page_table[row, jnp.clip(nth, 0, batch.page_table.shape[1] - 1)], 0)
    block = (1, sides, heads, s, lanes)
    one_page = pl.BlockSpec(block, lambda i, page, low, high: (page[i], 0, 0, 0, 0))
    return pl.pallas_call(
        _write_kernel,
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(row.shape[0],),
            in_specs=[pl.BlockSpec((1, *new.shape[1:]), lambda i, *_: (i, 0, 0, 0, 0)), one_page],
            out_specs=one_page,
        ),
        input_output_aliases={4: 0},  # counted with the three scalars
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_kv",
    )(page, low, high, new, pages)


def _write_kernel(page: Any, low: Any, high: Any, new: Any, old: Any, out: Any) -> None:
    """Replace rows ``[low, high)`` of one page."""
    i = pl.program_id(0)
    at = jax.lax.broadcasted_iota(jnp.int32, old.shape, 3)
    out[...] = jnp.where((at >= low[i]) & (at < high[i]), new[...], old[...])


def attention(
    q: jax.Array,
    pages: jax.Array,
    batch: Batch,
    *,
    q_tile: int,
    scale: float,
    switches: Switches = PLAIN,
    sinks: jax.Array | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """Causal attention of ragged queries over paged keys and values.

    Args:
        q: ``[T, N, H]`` queries of all rows end to end, padding last.
        pages: ``[P, sides, K, S, lanes]`` that already hold this step's keys and values.
        batch: where the tokens are in the pages.
        q_tile: queries of one row per tile; 1: every row has at most one query, and query t belongs to row t.
        scale: factor on attention scores.
        switches: window and soft cap; only pages that a tile's windows reach are read.
        sinks: ``[N]`` float32, see :class:`~astraea_jax.models.heads.Heads`.
        interpret: see :class:`PallasTPU`.

    Returns:
        ``[T, N, H]`` in the dtype of ``q``; rows of padding are zero.
    """
    t, n, h = q.shape
    _, sides, heads, s, lanes = pages.shape
    tiles = cut(batch.kv_lens, batch.cu_q_lens, q_tile, most(t, batch.kv_lens.shape[0], q_tile))
    count = tiles.row.shape[0]
    product_dtype = q.dtype if pages.dtype.itemsize == 1 else pages.dtype
    padded = jnp.pad(q.astype(product_dtype), ((0, 0), (0, 0), (0, lanes - h)))
    if q_tile == 1:
        tiled = padded.reshape(t, heads, n // heads, lanes)
    else:
        index = queries(tiles, batch.cu_q_lens, q_tile, t)
        tiled = jnp.take(padded, index, axis=0, mode="fill", fill_value=0)
        tiled = tiled.reshape(count, q_tile, heads, n // heads, lanes).transpose(0, 2, 3, 1, 4)
        tiled = tiled.reshape(count, heads, -1, lanes)  # [tiles, K, G * q_tile, lanes]

    page_bytes = math.prod(pages.shape[1:]) * pages.dtype.itemsize
    per_block = max(1, min(BLOCK_TOKENS // s, BUFFER_BYTES // page_bytes, batch.page_table.shape[1]))
    block = (1, *tiled.shape[1:])
    each = pl.BlockSpec(block, lambda i, *_: (i, 0, 0, 0))
    sunk = jnp.full(n, NEVER, jnp.float32) if sinks is None else sinks
    sunk = jnp.broadcast_to(jnp.repeat(sunk.reshape(heads, -1), q_tile, axis=1)[..., None], (*block[1:3], LANES))
    window, soft_cap = switches.window, switches.soft_cap
    out = pl.pallas_call(
        partial(_attend_kernel, q_tile=q_tile, scale=scale, window=window, soft_cap=soft_cap),
        out_shape=jax.ShapeDtypeStruct(tiled.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(count,),
            in_specs=[each, pl.BlockSpec(sunk.shape, lambda i, *_: (0, 0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=each,
            scratch_shapes=[
                pltpu.VMEM((2, per_block, *pages.shape[1:]), pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((*block[1:3], LANES), jnp.float32),
                pltpu.VMEM((*block[1:3], LANES), jnp.float32),
                pltpu.VMEM(block[1:], jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="paged_attention",
    )(tiles.row, tiles.reach, tiles.position, batch.page_table, tiled, sunk, pages)
    out = out[..., lanes // 2 : lanes // 2 + h] if sides == 1 else out[..., :h]
    if q_tile == 1:
        return out.reshape(t, n, h)
    out = out.reshape(count, heads, n // heads, q_tile, h).transpose(0, 3, 1, 2, 4).reshape(-1, n, h)
    return jnp.zeros((t, n, h), q.dtype).at[index.reshape(-1)].set(out, mode="drop")


def _attend_kernel(
    row: Any,
    reach: Any,
    position: Any,
    table: Any,
    q: Any,
    sinks: Any,
    pages: Any,
    out: Any,
    buffer: Any,
    arrived: Any,
    parity: Any,
    *state: Any,
    q_tile: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Attend one tile. Scalars are ``row, reach, position [C]`` (see :class:`Tiles`) and ``table [R, M]``.

    Inputs are ``q [1, K, L, lanes]``, ``sinks [K, L, 128]`` and ``pages`` in HBM; ``out`` is like ``q``. Scratch holds
    two buffers of pages, their semaphores, which of the two this tile begins with, and the state of
    :func:`_accumulate` for every head. A head without a sink has one that weighs nothing.
    """
    tile, tiles = pl.program_id(0), pl.num_programs(0)
    _, per_block, sides, heads, s, _ = buffer.shape
    size = per_block * s

    def oldest(tile: Any) -> Any:
        """Position of the first token that a query of the tile sees."""
        return 0 if window is None else jnp.maximum(position[tile] - window + 1, 0)

    def copies(of: Any, block: Any, side: Any, do: Callable[[Any], None]) -> None:
        first = oldest(of) // s + block * per_block
        _copies(row, reach, table, pages, buffer, arrived, of, first, side, do)

    start = oldest(tile) // s * s
    blocks = pl.cdiv(jnp.maximum(reach[tile] - start, 0), size)

    @pl.when(tile == 0)
    def first() -> None:
        parity[0] = 0
        copies(0, 0, 0, _START)

    begin = parity[0]
    for ref, value in zip(state, (sinks[...], 1.0, 0.0)):
        ref[...] = jnp.broadcast_to(value, ref.shape)

    def body(block: Any, _: None) -> None:
        side = jax.lax.rem(begin + block, 2)
        last = block + 1 == blocks

        @pl.when(~last | (tile + 1 < tiles))
        def ahead() -> None:
            of = jnp.where(last, jnp.minimum(tile + 1, tiles - 1), tile)
            copies(of, jnp.where(last, 0, block + 1), 1 - side, _START)

        copies(tile, block, side, _WAIT)
        at = start + block * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        own = position[tile] + jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (q.shape[2], 1), 0), q_tile)
        seen = at <= jnp.minimum(own, reach[tile] - 1)
        at_row = start + block * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        inside = at_row < reach[tile]
        if window is not None:
            seen &= at > own - window
            inside &= at_row >= oldest(tile)
        for head in range(heads):
            k = buffer[side, :, 0, head].reshape(size, -1).astype(q.dtype)
            v = buffer[side, :, sides - 1, head].reshape(size, -1).astype(q.dtype)
            v = jnp.where(inside, v, 0)  # values beyond may be NaN, and 0 * NaN is NaN
            scores = scale * mxu_product(q[0, head], k, 1)
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            _accumulate(jnp.where(seen, scores, NEVER), v, *(ref.at[head] for ref in state))

    jax.lax.fori_loop(0, blocks, body, None)
    parity[0] = jax.lax.rem(begin + blocks, 2)
    _, mass, total = state
    out[0] = (total[...] / mass[..., :1]).astype(out.dtype)


def _copies(
    row: Any, reach: Any, table: Any, pages: Any, buffer: Any, arrived: Any, of: Any, first: Any, side: Any, do: Any
) -> None:
    """Start or await the copies of a block's pages of tile ``of``, from the row's page ``first`` on.

    Pages beyond the tile's reach are not copied.
    """
    _, per_block, _, _, s, _ = buffer.shape

    def one(j: Any, _: None) -> None:
        do(pltpu.make_async_copy(pages.at[table[row[of], first + j]], buffer.at[side, j], arrived.at[side]))

    jax.lax.fori_loop(0, jnp.minimum(per_block, pl.cdiv(reach[of], s) - first), one, None)


def _accumulate(scores: jax.Array, v: jax.Array, top: Any, mass: Any, total: Any) -> None:
    """Add attention ``scores [L, tokens]`` and values ``v [tokens, lanes]`` to the state of one head.

    The state is the highest score and the sum of weights ``[L, 128]``, and the weighted values ``[L, lanes]``.
    """
    highest = jnp.maximum(top[...], scores.max(1, keepdims=True))
    shrink = jnp.exp(top[...] - highest)
    weights = jnp.exp(scores - highest[:, :1])
    top[...] = highest
    mass[...] = mass[...] * shrink + weights.sum(1, keepdims=True)
    total[...] = total[...] * shrink[:, :1] + mxu_product(weights.astype(v.dtype), v, 0)


def mxu_product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of ``a`` with ``axis`` of ``b`` in float32; by default the MXU rounds to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _shared(head_dim: int) -> bool:
    """Whether a key and a value share the lanes of a row."""
    return 2 * head_dim <= LANES


def _in_lanes(k: jax.Array, v: jax.Array, lanes: int) -> jax.Array:
    """Arrange ``k, v [T, K, H]`` as in pages: ``[T, sides, K, lanes]``."""
    h = k.shape[-1]
    if _shared(h):
        half = ((0, 0), (0, 0), (0, lanes // 2 - h))
        return jnp.concatenate([jnp.pad(k, half), jnp.pad(v, half)], axis=-1)[:, None]
    return jnp.pad(jnp.stack([k, v], axis=1), ((0, 0), (0, 0), (0, 0), (0, lanes - h)))
