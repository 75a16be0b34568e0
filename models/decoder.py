"""The decoder shared by Llama 3.x, Qwen2.5 and Qwen3 (dense).

The three differ in two switches of :class:`ModelConfig` (``qkv_bias``, ``qk_norm``) and in the scaling of the rotary
embedding, so one file serves them all. It does not know about pages: the caller passes ``attend``, which rotates
queries and keys, stores the new keys and values in its cache and returns the attention output.

Axis letters: T tokens of all sequences laid end to end, D hidden size, N query heads, K key/value heads, G = N / K
queries that share one, H head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .config import ModelConfig, RopeScaling
from .heads import Heads, rms_norm
from .product import bits, product, rows
from .quantize import matrix, project

LayerCache = Any
"""State that ``attend`` keeps for one layer; opaque to the model."""

Index = int | jax.Array

Attend = Callable[[Index, Heads, LayerCache], tuple[jax.Array, LayerCache]]
"""``attend(layer, heads, cache) -> (out [T, N, H], cache)``."""

Rotary = tuple[jax.Array, jax.Array]
"""Cosine and sine ``[T, H / 2]`` of the rotary embedding's angles."""


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angular frequency of every pair of a head's dimensions, ``[H / 2]`` float32 (RoFormer, arXiv 2104.09864).

    With ``scaling``, wavelengths beyond the original context are stretched by ``factor`` and those between the two
    bounds are blended, as in Llama 3.1.
    """
    freqs = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return freqs
    turns = scaling.original_max_position * freqs / (2 * math.pi)  # rotations over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return freqs * (keep + (1 - keep) / scaling.factor)


def _rotary(angle: jax.Array) -> Rotary:
    return jnp.cos(angle), jnp.sin(angle)


def _rotary_in_memory(angle: jax.Array) -> Rotary:
    """Cosine and sine, as XLA for CPUs computes them once.

    It fuses them into every layer otherwise, where they are computed for each head again, and drops barriers before it
    does so. A branch stays, as it cannot know that positions are never negative.
    """
    return jax.lax.cond(angle[0, 0] >= 0, _rotary, lambda angle: (angle, angle), angle)


class RMSNorm(nnx.Module):
    """:func:`~astraea_jax.models.heads.rms_norm` with its scale."""

    def __init__(self, size: int, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Grouped-query attention.

    Queries, keys and values are one product, ``[D, K * (G + 2) * H]``: for each key/value head its queries, then its
    key, then its value. It is sharded by key/value head, so that splitting the three moves no data. All matrices have
    two axes, which compilers read without transposing them first.
    """

    def __init__(self, config: ModelConfig, dtype: Any, quantized_dtype: Any, rngs: nnx.Rngs):
        d, n, k, h = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.heads = k, n // k + 2, h
        self.qkv, self.qkv_scale = matrix((d, math.prod(self.heads)), dtype, quantized_dtype, rngs)
        self.o, self.o_scale = matrix((n * h, d), dtype, quantized_dtype, rngs)
        self.has_bias, self.qk_norm = config.qkv_bias, config.qk_norm
        if config.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros(math.prod(self.heads), dtype))
        if config.qk_norm:
            self.q_norm = RMSNorm(h, config.rms_eps, dtype)
            self.k_norm = RMSNorm(h, config.rms_eps, dtype)

    def __call__(
        self, x: jax.Array, rotary: Rotary, attend: Attend, layer: Index, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        qkv = project(x, self.qkv, self.qkv_scale)
        if self.has_bias:
            qkv = qkv + self.qkv_bias[...]
        heads = Heads(qkv.reshape(-1, *self.heads), *rotary)
        if self.qk_norm:
            q_norm, k_norm = self.q_norm.scale[...], self.k_norm.scale[...]
            heads = dataclasses.replace(heads, q_norm=q_norm, k_norm=k_norm, eps=self.q_norm.eps)
        out, cache = attend(layer, heads, cache)
        return project(out.reshape(out.shape[0], -1), self.o, self.o_scale), cache


class MLP(nnx.Module):
    """SwiGLU feed-forward network.

    Gate and up projection are one product, ``[D, 2 * F]``, in which blocks of the two alternate
    (:attr:`ModelConfig.ffn_block`), so that it can be sharded by features.
    """

    def __init__(self, config: ModelConfig, dtype: Any, quantized_dtype: Any, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.block = config.ffn_block
        self.gate_up, self.gate_up_scale = matrix((d, 2 * f), dtype, quantized_dtype, rngs)
        self.down, self.down_scale = matrix((f, d), dtype, quantized_dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_up = project(x, self.gate_up, self.gate_up_scale).reshape(x.shape[0], -1, 2, self.block)
        inner = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return project(inner.reshape(x.shape[0], -1), self.down, self.down_scale)


class Layer(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, dtype: Any, quantized_dtype: Any, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_eps, dtype)
        self.attention = Attention(config, dtype, quantized_dtype, rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_eps, dtype)
        self.mlp = MLP(config, dtype, quantized_dtype, rngs)

    def __call__(
        self, x: jax.Array, rotary: Rotary, attend: Attend, layer: Index, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        out, cache = self.attention(self.input_norm(x), rotary, attend, layer, cache)
        x = x + out
        return x + self.mlp(self.post_attention_norm(x)), cache


class Stack(nnx.Module):
    """All layers as one whose arrays are ``[L, …]``, run in a loop that is compiled once instead of per layer.

    It pays where the compiler reads a layer's weights directly from the stack: XLA does so for TPUs, but copies them
    first for GPUs.
    """

    def __init__(self, layer: Layer, count: int):
        self.layer, self.count = layer, count

    def __call__(self, x: jax.Array, rotary: Rotary, attend: Attend, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        graph, arrays = nnx.split(self.layer)

        def body(carry: tuple[jax.Array, LayerCache], each: Any) -> tuple[tuple[jax.Array, LayerCache], None]:
            i, of_one = each
            layer: Layer = nnx.merge(graph, of_one)
            x, cache = carry
            return layer(x, rotary, attend, i, cache), None

        with jax.named_scope("layers"):
            carry, _ = jax.lax.scan(body, (x, cache), (jnp.arange(self.count), arrays))
        return carry


class Embedding(nnx.Module):
    """Token embedding table ``[V, D]``."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs):
        self.weight = _normal((config.vocab_size, config.hidden_size), dtype, rngs)


class Head(nnx.Module):
    """Output projection ``[D, V]`` of a model that does not tie it to the embedding."""

    def __init__(self, config: ModelConfig, dtype: Any, rngs: nnx.Rngs):
        self.weight = _normal((config.hidden_size, config.vocab_size), dtype, rngs)


class Decoder(nnx.Module):
    """A decoder-only transformer over ragged tokens.

    Args:
        config: shape and constants.
        dtype: of weights and activations; norms, the rotary embedding and logits are computed in float32.
        quantized_dtype: 8-bit dtype of the layers' matrices, which then have scales (see :mod:`.quantize`). None: they
            are in ``dtype``.
        rngs: source of the random initial weights.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.bfloat16, quantized_dtype: Any = None, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config, dtype, rngs)
        self.layers: nnx.List[Layer] | Stack = nnx.List(
            [Layer(config, dtype, quantized_dtype, rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_eps, dtype)
        if not config.tie_embeddings:
            self.lm_head = Head(config, dtype, rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: Any, attend: Attend, *, dtype: Any = None
    ) -> tuple[jax.Array, Any]:
        """Run ``tokens [T]`` int32 at ``positions [T]`` int32; return the final hidden states ``[T, D]`` and the cache.

        Activations are in ``dtype``; None: in that of the embedding.

        ``cache`` is a sequence with the cache of each layer, or one cache of all layers if they are stacked; ``attend``
        is given the one or the other.
        """
        c = self.config
        angle = positions[:, None] * rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        rotary = jax.lax.platform_dependent(angle, cpu=_rotary_in_memory, default=_rotary)
        x = rows(self.embed.weight[...], tokens, dtype or self.embed.weight[...].dtype)
        if isinstance(self.layers, Stack):
            x, cache = self.layers(x, rotary, attend, cache)
            return self.norm(x), cache
        graph, _ = nnx.split(self.layers[0])

        @jax.jit  # traced once instead of once per layer; what is compiled is the same
        def run(of_one: Any, i: jax.Array, x: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
            layer: Layer = nnx.merge(graph, of_one)
            return layer(x, rotary, attend, i, cache)

        caches = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                x, layer_cache = run(nnx.state(layer), jnp.int32(i), x, cache[i])
            caches.append(layer_cache)
        return self.norm(x), tuple(caches)

    def keep_bits(self) -> None:
        """Turn matrices of bfloat16 into integers of the same bits (:mod:`.product`), in place, for a CPU."""
        state = nnx.state(self)
        kept = [
            (path, leaf.replace(bits(leaf[...])) if leaf.ndim > 1 and leaf.dtype == jnp.bfloat16 else leaf)
            for path, leaf in nnx.to_flat_state(state)
        ]
        nnx.update(self, nnx.from_flat_state(kept))

    @property
    def stacked(self) -> bool:
        """Whether the layers are a :class:`Stack`."""
        return isinstance(self.layers, Stack)

    def stack(self) -> None:
        """Turn the layers into a :class:`Stack`, unless they are one.

        A parameter's arrays are freed once they are stacked, so this needs extra memory for the largest one only.
        """
        if isinstance(self.layers, Stack):
            return
        count, (graph, _) = len(self.layers), nnx.split(self.layers[0])
        states = [dict(nnx.to_flat_state(nnx.state(layer))) for layer in self.layers]
        self.layers = nnx.List([])
        stacked = []
        for path, leaf in list(states[0].items()):
            stacked.append((path, leaf.replace(jnp.stack([state.pop(path)[...] for state in states]))))
        self.layers = Stack(nnx.merge(graph, nnx.from_flat_state(stacked)), count)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of the next token, ``[T, D] -> [T, V]`` float32."""
        if self.config.tie_embeddings:
            return product(hidden, self.embed.weight[...], transposed=True)
        return product(hidden, self.lm_head.weight[...])


def _normal(shape: tuple[int, ...], dtype: Any, rngs: nnx.Rngs) -> nnx.Param[Any]:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
