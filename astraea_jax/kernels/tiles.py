"""Ragged queries cut into tiles of equal size: what a kernel hands to one turn of its loop or grid."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """``[C]`` int32 each; a tile holds queries of one row, and tiles that hold none come last."""

    row: jax.Array
    first: jax.Array
    """Of the row's queries of this step, the tile's first."""
    used: jax.Array
    """Queries in the tile."""
    reach: jax.Array
    """Context tokens that the tile's last query may see; 0 for a tile that holds none."""
    position: jax.Array
    """Of the tile's first query in its context."""


def cut(kv_lens: jax.Array, cu_q_lens: jax.Array, q_tile: int, tiles: int) -> Tiles:
    """Cut the queries of every row into tiles of ``q_tile``, the last of a row shorter; see :func:`most` for the count.

    Args:
        kv_lens: ``[R]`` int32, tokens in each row's context, this step's included.
        cu_q_lens: ``[R + 1]`` int32, where each row's queries start.
        q_tile: queries per tile.
        tiles: C, how many tiles there shall be.
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
    """Tiles that hold any ``tokens`` queries of ``rows`` rows: full ones, and a partial one per row."""
    return tokens if q_tile == 1 else -(-tokens // q_tile) + rows


def queries(tiles: Tiles, cu_q_lens: jax.Array, q_tile: int, nowhere: int) -> jax.Array:
    """Index ``[C, q_tile]`` of every tile's queries among all; ``nowhere`` where a tile holds none."""
    lane = jnp.arange(q_tile)
    index = cu_q_lens[tiles.row][:, None] + tiles.first[:, None] + lane
    return jnp.where(lane < tiles.used[:, None], index, nowhere)
