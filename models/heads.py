"""Queries, keys and values of one layer: what a decoder hands to attention, before their norm and rotation.

A kernel may take them as they come out of the layer's projection; :meth:`Heads.rotated` is for all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32, times ``scale``.

    It is rounded to the dtype of ``x`` before it is scaled, but for a ``scale`` in float32, as families differ in that.
    """
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    if scale.dtype == jnp.float32:
        return (f * scale).astype(x.dtype)
    return f.astype(x.dtype) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply the rotary embedding ``cos, sin [T, H / 2]`` to ``x [T, heads, H]`` (RoFormer, arXiv 2104.09864).

    Halves are paired as in Hugging Face's models.
    """
    cos, sin = cos[:, None], sin[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@dataclass(frozen=True)
class Switches:
    """What attention does in some layers of some models."""

    window: int | None = None
    """Keys that a query sees, its own included; None: all."""
    scale: float | None = None
    """Factor on scores; None: ``H ** -0.5``."""
    soft_cap: float | None = None
    """Scores become ``cap * tanh(score / cap)``."""


PLAIN = Switches()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heads:
    """One layer's heads of T tokens, and what makes queries and keys of them."""

    qkv: jax.Array
    """``[T, K, G + 2, H]``: for each of K key/value heads its G queries, then its key, then its value."""
    cos: jax.Array
    """``[T, H / 2]`` float32, of the angle by which each pair of a head's dimensions is rotated."""
    sin: jax.Array
    """``[T, H / 2]`` float32."""
    q_norm: jax.Array | None = None
    """``[H]``, the scale of the norm of queries before the rotation; None: there is no norm."""
    k_norm: jax.Array | None = None
    """``[H]``, in the same way for keys; queries and keys have a norm, or neither."""
    sinks: jax.Array | None = None
    """``[N]`` float32, a logit of each head that takes part in the softmax and adds nothing to the output (Efficient
    Streaming Language Models, arXiv 2309.17453, as gpt-oss learns them)."""
    eps: float = field(default=0.0, metadata={"static": True})
    """Added to the mean square in these norms."""
    switches: Switches = field(default=PLAIN, metadata={"static": True})

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array) -> Self:
        """Heads of ``q [T, N, H]`` and ``k, v [T, K, H]`` that need neither norm nor rotation."""
        t, heads, h = k.shape
        qkv = jnp.concatenate([q.reshape(t, heads, -1, h), k[:, :, None], v[:, :, None]], axis=2)
        nothing = jnp.zeros((t, h // 2), jnp.float32)
        return cls(qkv, nothing + 1, nothing)

    @property
    def scale(self) -> float:
        """Factor on attention scores."""
        return self.qkv.shape[-1] ** -0.5 if self.switches.scale is None else self.switches.scale

    @property
    def group(self) -> int:
        """G, the queries that share a key."""
        return self.qkv.shape[2] - 2

    def rotated(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries ``[T, N, H]`` and keys ``[T, K, H]`` after norm and rotation, and values ``[T, K, H]``."""
        q, k, v = self.qkv[:, :, :-2], self.qkv[:, :, -2], self.qkv[:, :, -1]
        q = q.reshape(q.shape[0], -1, q.shape[-1])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, self.eps), rms_norm(k, self.k_norm, self.eps)
        return rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin), v
