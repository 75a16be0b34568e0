"""Ragged queries cut into tiles of equal size, the unit of a kernel's loop or grid."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """Columns ``[C]`` int32 of tiles; a tile holds queries of one row, and empty tiles come last."""

    row: jax.Array
    first: jax.Array
    """Index of the tile's first query among the row's queries of this step."""
    used: jax.Array
    """Queries in the tile."""
    reach: jax.Array
    """Context tokens that the tile's last query attends to; 0 for an empty tile."""
    position: jax.Array
    """Position of the tile's first query in its context."""


def singles(kv_lens: jax.Array, cu_q_lens: jax.Array) -> Tiles:
    """Return a tile of one query for each of the ``R`` rows that has just one; those of other rows are empty.

    Args:
        kv_lens: ``[R]`` int32, as in :func:`cut`.
        cu_q_lens: ``[R + 1]`` int32, in the same way.
    """
    used = (cu_q_lens[1:] - cu_q_lens[:-1] == 1).astype(jnp.int32)
    rows = jnp.arange(len(kv_lens))
    return Tiles(rows, jnp.zeros_like(rows), used, kv_lens * used, kv_lens - 1)


def cut(kv_lens: jax.Array, cu_q_lens: jax.Array, q_tile: int, tiles: int) -> Tiles:
    """Cut the queries of every row into tiles of ``q_tile``, the last of a row possibly shorter.

    Args:
        kv_lens: ``[R]`` int32, length of each row's context including this step's tokens.
        cu_q_lens: ``[R + 1]`` int32, where each row's queries start.
        q_tile: queries per tile.
        tiles: C, the number of tiles, at least :func:`most`.
    """
    rows = kv_lens.shape[0]
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    count = -(-q_lens // q_tile)
    ends = jnp.cumsum(count)
    tile = jnp.arange(tiles)
    row = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), rows - 1)
    first = (tile - (ends - count)[row]) * q_tile
    used = jnp.where(tile < ends[-1], jnp.minimum(q_lens[row] - first, q_tile), 0)
    position = kv_lens[row] - q_lens[row] + first
    return Tiles(row, first, used, jnp.where(used > 0, position + used, 0), position)


def most(tokens: int, rows: int, q_tile: int) -> int:
    """Most tiles that ``tokens`` queries of ``rows`` rows can need: full ones, and a partial one per row."""
    return tokens if q_tile == 1 else -(-tokens // q_tile) + rows


def queries(tiles: Tiles, cu_q_lens: jax.Array, q_tile: int, nowhere: int) -> jax.Array:
    """Indices ``[C, q_tile]`` of every tile's queries in the step; ``nowhere`` for unused places."""
    lane = jnp.arange(q_tile)
    index = cu_q_lens[tiles.row][:, None] + tiles.first[:, None] + lane
    return jnp.where(lane < tiles.used[:, None], index, nowhere)
