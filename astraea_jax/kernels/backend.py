"""What a backend of attention owns: the physical form of a page, and writing and reading pages in a step.

Page ids are logical and the page is always the first axis, so whoever allocates, gathers, moves and scatters pages need
not know what is inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Batch(NamedTuple):
    """Where the tokens of a step belong."""

    page_table: jax.Array
    """``[R, M]`` int32, the pages of each row in order; what lies beyond its context is not to be relied on."""
    kv_lens: jax.Array
    """``[R]`` int32, tokens in each row's context, this step's included; 0 for padding."""
    cu_q_lens: jax.Array
    """``[R + 1]`` int32, where each row's tokens start; they are the last of its context."""
    slots: jax.Array
    """``[T]`` int32, where each token's keys and values go: page * S + offset; padding goes to page 0, the scrap."""

    def shifted(self, pages: int | jax.Array, page_size: int) -> Batch:
        """The same, so many pages further on."""
        return self._replace(page_table=self.page_table + pages, slots=self.slots + pages * page_size)


def stored(x: jax.Array, dtype: Any) -> jax.Array:
    """Keys or values as pages of ``dtype`` hold them.

    Float8 has neither a scale nor infinity: what is beyond its largest number becomes that number, or else it would be
    NaN. Of normal numbers the rounding error is 2.65 % for any size from 0.05 to 100, with a scale or not.
    """
    if dtype == jnp.float8_e4m3fn:
        largest = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)


class Backend(Protocol):
    """Ragged paged attention of one layer on one kind of device."""

    name: str
    heads_axis: int
    """Of the pages of a layer ``[P, …]``: the axis along which they are sharded by key/value head."""

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int, dtype: Any) -> tuple[int, ...]:
        """Shape of one page of one layer; what it holds beyond keys and values is padding.

        Raises:
            StartupError: the backend has no such pages, because of a size or of ``dtype``.
        """

    def page_dtype(self, dtype: Any) -> Any:
        """Dtype of the array in which pages of keys and values in ``dtype`` lie, of the same width."""

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, batch: Batch, *, q_tile: int
    ) -> tuple[jax.Array, jax.Array]:
        """Store keys and values, then attend causally, scaled by ``H ** -0.5``.

        What is beyond the largest number of a float8 page is stored as that number.

        Args:
            q: ``[T, N, H]`` queries of all rows end to end, padding last.
            k: ``[T, K, H]`` keys.
            v: ``[T, K, H]`` values.
            pages: ``[P, *page_shape]`` of this layer.
            batch: where they belong.
            q_tile: 1: every row has one token at most, and token t is row t's; else rows are of any length.

        Returns:
            ``[T, N, H]`` in the dtype of ``q`` (of padding: finite numbers of no use), and the pages.
        """
