"""Ragged paged attention on CPUs, in C++: one call a layer, from the projection's result to attention's.

Pages are as :class:`~astraea_jax.kernels.reference.Reference` has them, and are written in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from astraea_jax.errors import StartupError
from astraea_jax.kernels.backend import Batch
from astraea_jax.kernels.reference import BITS
from astraea_jax.models.heads import Heads

from .library import load

KV_DTYPES = (jnp.dtype(jnp.float32), *BITS)
"""Dtypes of keys and values."""


@dataclass(frozen=True)
class Native:
    """The backend of ``attention.cc``.

    Raises:
        StartupError: the library cannot be built or loaded here.
    """

    name = "native"
    heads_axis = 2
    has_sinks = True

    def __post_init__(self) -> None:
        load()

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int, dtype: Any) -> tuple[int, ...]:
        """``(2, K, S, H)``.

        Raises:
            StartupError: ``dtype`` is not one of :data:`KV_DTYPES`.
        """
        if jnp.dtype(dtype) not in KV_DTYPES:
            able = ", ".join(map(str, KV_DTYPES))
            raise StartupError(f"attention 'native' keeps KV in {able}, not {dtype}; choose one, or 'reference'")
        return (2, kv_heads, page_size, head_dim)

    def page_dtype(self, dtype: Any) -> Any:
        """The integer dtype of :data:`BITS` if ``dtype`` has one, else ``dtype``."""
        return BITS.get(jnp.dtype(dtype), jnp.dtype(dtype))

    def attend(self, heads: Heads, pages: jax.Array, batch: Batch, *, q_tile: int) -> tuple[jax.Array, jax.Array]:
        """As :class:`~astraea_jax.kernels.backend.Backend` has it; how rows are cut does not depend on ``q_tile``."""
        dtype = heads.qkv.dtype
        if dtype != jnp.float32:  # norm and rotation round to the dtype
            q, k, v = (x.astype(jnp.float32) for x in heads.rotated())
            turned = Heads.of(q, k, v)
            heads = Heads(turned.qkv, turned.cos, turned.sin, sinks=heads.sinks, switches=heads.switches)
        t, kv_heads, width, h = heads.qkv.shape
        results = [
            jax.ShapeDtypeStruct((t, kv_heads * (width - 2), h), jnp.float32),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ]
        given = [
            heads.qkv,
            heads.cos,
            heads.sin,
            *(jnp.zeros(0) if x is None else x.astype(jnp.float32) for x in (heads.q_norm, heads.k_norm, heads.sinks)),
            *(x.astype(jnp.int32) for x in (batch.page_table, batch.kv_lens, batch.cu_q_lens, batch.slot_mapping)),
            pages,
        ]
        call = jax.ffi.ffi_call("astraea_attention", results, input_output_aliases={len(given) - 1: 1})
        switches = heads.switches
        out, pages = call(
            *given,
            eps=np.float32(heads.eps),
            scale=np.float32(heads.scale),
            soft_cap=np.float32(switches.soft_cap or 0),
            window=np.int64(switches.window or 0),
        )
        return out.astype(dtype), pages
