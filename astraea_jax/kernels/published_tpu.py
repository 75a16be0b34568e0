"""Published ragged paged attention for TPUs: tokamax's, and the one in JAX, which every installation has.

Both have their own form of a page, and neither runs without a TPU; tests run :mod:`.pallas_tpu` instead.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from astraea_jax.errors import StartupError
from astraea_jax.models.heads import Heads

from .backend import Batch, stored
from .pallas_tpu import LANES, VMEM_BYTES, check_page_table

QUERIES_PER_BLOCK = 32
PAGES_PER_BLOCK_TOKENS = 256
"""Context tokens per block of JAX's kernel, whose own table of block sizes requires a TPU in this process."""


class TokamaxRPA:
    """``tokamax.ops.ragged_paged_attention``, which also writes the pages."""

    name = "tokamax"
    heads_axis = 2
    has_sinks = False
    """The kernel can return the logarithm of a query's sum of weights, but rounds it to bfloat16."""

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int, dtype: Any) -> tuple[int, ...]:
        """``(S, 2K / pack, pack, lanes)``: keys and values alternate, ``pack`` of them per 32-bit word.

        Raises:
            StartupError: tokamax is not installed, or does not support such pages.
        """
        if importlib.util.find_spec("tokamax") is None:
            raise StartupError("tokamax is not installed; on Python 3.12 or newer, install the [tpu] extra")
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float8_e4m3fn):
            raise StartupError(f"attention 'tokamax' keeps bfloat16 and float8, not {jnp.dtype(dtype).name}")
        if head_dim not in (64, 128, 256):
            raise StartupError(f"attention 'tokamax' has heads of 64, 128 or 256 dimensions, not {head_dim}")
        if page_size % 16:
            raise StartupError(f"attention 'tokamax' needs pages of a multiple of 16 tokens, not {page_size}")
        pack = 4 // jnp.dtype(dtype).itemsize
        return (page_size, -(-2 * kv_heads // pack), pack, -(-head_dim // LANES) * LANES)

    def page_dtype(self, dtype: Any) -> Any:
        """Return ``dtype``: pages hold the numbers themselves."""
        return jnp.dtype(dtype)

    def attend(self, heads: Heads, pages: jax.Array, batch: Batch, *, q_tile: int) -> tuple[jax.Array, jax.Array]:
        """Call the kernel, which uses its decode path for leading rows of one token."""
        q, k, v = heads.rotated()
        from tokamax import ops

        window, decode = heads.switches.window, q_tile == 1
        batch = batch.within(window, pages.shape[1], decode=decode)
        check_page_table(batch)
        q_lens = batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]
        rows = jnp.sum(q_lens > 0)
        single = rows if decode else jnp.sum(jnp.cumprod(q_lens == 1))
        out, pages = ops.ragged_paged_attention(
            q,
            stored(k, pages.dtype),
            stored(v, pages.dtype),
            pages,
            batch.kv_lens,
            batch.page_table.reshape(-1),
            batch.cu_q_lens,
            jnp.stack([single, single, rows]).astype(jnp.int32),
            sm_scale=heads.scale,
            sliding_window=window,
            soft_cap=heads.switches.soft_cap,
            implementation="mosaic_tpu",
        )
        return _without_padding(out, batch), pages


class JaxRPA:
    """``jax.experimental.pallas.ops.tpu.ragged_paged_attention`` after a scatter, which XLA does in place."""

    name = "jax-rpa"
    heads_axis = 2
    has_sinks = False

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int, dtype: Any) -> tuple[int, ...]:
        """``(S, 2K, H)``: the key and then the value of each head.

        Raises:
            StartupError: the kernel does not support such pages.
        """
        if head_dim != LANES:
            raise StartupError(f"attention 'jax-rpa' has heads of {LANES} dimensions, not {head_dim}")
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn):
            raise StartupError(f"attention 'jax-rpa' keeps bfloat16, float32 and float8, not {jnp.dtype(dtype).name}")
        return (page_size, 2 * kv_heads, head_dim)

    def page_dtype(self, dtype: Any) -> Any:
        """Return ``dtype``: pages hold the numbers themselves."""
        return jnp.dtype(dtype)

    def attend(self, heads: Heads, pages: jax.Array, batch: Batch, *, q_tile: int) -> tuple[jax.Array, jax.Array]:
        """Scatter, then attend."""
        q, k, v = heads.rotated()
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

        size, window = pages.shape[1], heads.switches.window
        batch = batch.within(window, size, decode=q_tile == 1)
        check_page_table(batch)
        kv = stored(jnp.stack([k, v], axis=2).reshape(k.shape[0], -1, k.shape[2]), pages.dtype)
        pages = pages.at[batch.slot_mapping // size, batch.slot_mapping % size].set(kv)
        rows = jnp.sum(batch.cu_q_lens[1:] > batch.cu_q_lens[:-1])
        out = ragged_paged_attention(
            q,
            pages,
            batch.kv_lens,
            batch.page_table,
            batch.cu_q_lens,
            rows[None].astype(jnp.int32),
            sm_scale=heads.scale,
            sliding_window=window,
            soft_cap=heads.switches.soft_cap,
            num_kv_pages_per_block=max(1, min(PAGES_PER_BLOCK_TOKENS // size, batch.page_table.shape[1])),
            num_queries_per_block=min(QUERIES_PER_BLOCK, q.shape[0]),
            vmem_limit_bytes=VMEM_BYTES,
        )
        return _without_padding(out, batch), pages


def _without_padding(out: jax.Array, batch: Batch) -> jax.Array:
    """``out [T, N, H]`` with zeros for padding, which the kernels leave uninitialised."""
    return jnp.where((jnp.arange(out.shape[0]) < batch.cu_q_lens[-1])[:, None, None], out, 0)
