"""What a decoder leaves to its caller, since it depends on pages, devices and kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from .experts import Mixed
from .heads import Heads
from .matrix import Matrix, multiply
from .product import product

LayerCache = Any
"""State that ``attend`` keeps for one layer; opaque to the model."""

Index = int | jax.Array

Attend = Callable[[Index, Heads, LayerCache], tuple[jax.Array, LayerCache]]
"""``attend(layer, heads, cache) -> (out [T, N, H], cache)``: stores keys and values, and attends."""


@dataclass(frozen=True)
class Operations:
    """Attention, products with matrices, by default in jax.numpy, and mixtures of experts."""

    attend: Attend
    multiply: Callable[[jax.Array, Matrix], jax.Array] = multiply
    """``multiply(x [T, I], matrix [I, O]) -> [T, O]``."""
    product: Callable[..., jax.Array] = product
    """Product with the head, as :func:`.product.product`; it may return more outputs than there are."""
    mixed: Mixed | None = None
    """None: the model has no experts."""
