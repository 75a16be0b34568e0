"""The interface of an attention backend: it owns the physical form of a page, and writes and reads pages in a step.

Page ids are logical and the page is always the first axis, so code that allocates, gathers, moves and scatters pages
need not know the form of a page.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from astraea_jax.models.heads import Heads


class Batch(NamedTuple):
    """Places of a step's tokens in the paged arrays."""

    page_table: jax.Array
    """``[R, M]`` int32, the pages of each row in order; entries beyond its context are undefined."""
    kv_lens: jax.Array
    """``[R]`` int32, length of each row's context including this step's tokens; 0 for padding."""
    cu_q_lens: jax.Array
    """``[R + 1]`` int32, where each row's tokens start; they are the last of its context."""
    slot_mapping: jax.Array
    """``[T]`` int32, where each token's keys and values go: page * S + offset, and the null page 0 for padding."""

    def shifted(self, pages: int | jax.Array, page_size: int) -> Batch:
        """The batch with page ids and slot mapping offset by ``pages``."""
        slot_mapping = self.slot_mapping + pages * page_size
        return self._replace(page_table=self.page_table + pages, slot_mapping=slot_mapping)

    def within(self, window: int | None, page_size: int, *, decode: bool) -> Batch:
        """The batch without the pages that no query sees: a row begins with the page that its first window begins in.

        Kernels that read contexts from their first page on then read no other, and no page that has been freed, since
        attention does not depend on positions, but for their order. In ``decode`` rows have one query at most.
        """
        if window is None:
            return self
        past = self.kv_lens - (self.cu_q_lens[1:] - self.cu_q_lens[:-1])
        first = jnp.maximum(past - window + 1, 0) // page_size
        width = self.page_table.shape[1]
        width = min(width, (window - 2) // page_size + 2) if decode else width
        page_table = jnp.take_along_axis(self.page_table, first[:, None] + jnp.arange(width), axis=1, mode="clip")
        return self._replace(page_table=page_table, kv_lens=self.kv_lens - first * page_size)


def stored(x: jax.Array, dtype: Any) -> jax.Array:
    """Convert keys or values to the ``dtype`` of pages.

    Float8 has no infinity, so larger numbers are clipped to its largest one; otherwise they would become NaN. No scale
    is used: the rounding error of normal numbers is 2.65 % for any magnitude from 0.05 to 100, with a scale or without.
    """
    if dtype == jnp.float8_e4m3fn:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)


class Backend(Protocol):
    """Ragged paged attention of one layer on one kind of device."""

    name: str
    heads_axis: int
    """Axis of a layer's pages ``[P, …]`` along which key/value heads are sharded."""
    has_sinks: bool
    """Whether it serves heads with sinks (:class:`~astraea_jax.models.heads.Heads`)."""

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int, dtype: Any) -> tuple[int, ...]:
        """Shape of one page of one layer, padding included.

        Raises:
            StartupError: the backend does not support these sizes or this ``dtype``.
        """

    def page_dtype(self, dtype: Any) -> Any:
        """Dtype of the array that holds pages of keys and values in ``dtype``; its size is the same."""

    def attend(self, heads: Heads, pages: jax.Array, batch: Batch, *, q_tile: int) -> tuple[jax.Array, jax.Array]:
        """Store keys and values, then attend causally, scaled by ``H ** -0.5``; see :func:`stored` for float8 pages.

        Args:
            heads: of the T tokens of all rows end to end, padding last; queries, keys and values are what
                :meth:`~astraea_jax.models.heads.Heads.rotated` makes of them.
            pages: ``[P, *page_shape]``, this layer's pages.
            batch: where the tokens are in the pages.
            q_tile: 1 if every row has at most one token and token t belongs to row t; otherwise rows have any length.

        Returns:
            ``[T, N, H]`` in the dtype of ``heads``, finite but undefined for padding, and the pages.
        """
