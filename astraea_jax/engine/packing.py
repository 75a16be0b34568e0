"""A model's arrays as arguments of a step, fewer than they are: each argument of a call costs host time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

Packed = tuple[Any, ...]
"""A model's arrays, or their shapes, as arguments of a step."""


@dataclass(frozen=True)
class Packing:
    """Joins a model's many vectors (of norms, scales and biases) into one argument per dtype."""

    shapes: tuple[tuple[int, ...], ...]
    """Of all leaves."""
    vectors: tuple[tuple[int, ...], ...]
    """Per dtype, indices of the leaves that are joined end to end."""
    ends: tuple[tuple[int, ...], ...]
    """Per dtype, where each of these leaves but the last ends."""

    @classmethod
    def of(cls, leaves: Sequence[jax.ShapeDtypeStruct]) -> Packing:
        """What of these arrays is joined: those that every device has as a whole."""
        by_dtype: dict[Any, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if leaf.size == leaf.shape[-1] and leaf.sharding.is_fully_replicated:  # or [1, n]
                by_dtype.setdefault(leaf.dtype, []).append(i)
        ends = (np.cumsum([leaves[i].size for i in group])[:-1].tolist() for group in by_dtype.values())
        shapes = tuple(tuple(leaf.shape) for leaf in leaves)
        return cls(shapes, tuple(map(tuple, by_dtype.values())), tuple(map(tuple, ends)))

    def pack(self, leaves: Sequence[Any], join: Any) -> Packed:
        """The arguments that stand for the leaves; ``join`` makes one of several arrays of a dtype."""
        joined = {i for group in self.vectors for i in group}
        alone = (leaf for i, leaf in enumerate(leaves) if i not in joined)
        return (*alone, *(join(*(leaves[i] for i in group)) for group in self.vectors))

    def unpack(self, packed: Packed) -> list[Any]:
        """The leaves."""
        pieces: dict[int, Any] = {}
        first = len(packed) - len(self.vectors)
        for group, ends, joined in zip(self.vectors, self.ends, packed[first:], strict=True):
            pieces.update(zip(group, jnp.split(joined, ends), strict=True))
        alone = iter(packed[:first])
        return [pieces[i].reshape(s) if i in pieces else next(alone) for i, s in enumerate(self.shapes)]


def joined_shape(sharding: NamedSharding, *vectors: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of arrays joined end to end."""
    return jax.ShapeDtypeStruct((sum(x.size for x in vectors),), vectors[0].dtype, sharding=sharding)
