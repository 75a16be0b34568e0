"""The decoder of every family that is served.

Families differ in the switches of :class:`ModelConfig`, so one file serves them all. It does not know about pages,
devices or kernels: the caller passes :class:`.operations.Operations`.

Axis letters: T tokens of all sequences laid end to end, D hidden size, N query heads, K key/value heads, G = N / K
queries that share one, H head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .config import LayerKind, ModelConfig
from .experts import Mixture
from .heads import Heads, Switches, rms_norm
from .matrix import Forms, InStack, Matrix, plain, within
from .mlp import MLP
from .operations import Index, LayerCache, Operations
from .product import BITS, BITS_OF, bits, product, rows
from .rope import Rope

MULTIPLIED = ("weight", "router")
"""Names of the parameters that are multiplied by :mod:`.product`."""


def _turns(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.cos(angle), jnp.sin(angle)


def _turns_in_memory(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, as XLA for CPUs computes them once.

    It fuses them into every layer otherwise, where they are computed for each head again, and drops barriers before it
    does so. A branch stays, as it cannot know that positions are never negative.
    """
    return jax.lax.cond(angle[0, 0] >= 0, _turns, lambda angle: (angle, angle), angle)


class RMSNorm(nnx.Module):
    """:func:`~astraea_jax.models.heads.rms_norm` with its scale."""

    def __init__(self, config: ModelConfig, size: int, dtype: Any):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32 if config.float32_norms else dtype))
        self.eps = config.rms_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


class Positions(NamedTuple):
    """What attention of T tokens needs of their positions."""

    cos: jax.Array
    """``[T, H / 2]`` float32, of the rotary embedding's angles."""
    sin: jax.Array
    """``[T, H / 2]`` float32."""
    growth: jax.Array | None
    """``[T]`` float32, a factor on queries."""

    @classmethod
    def of(cls, positions: jax.Array, rope: Rope, config: ModelConfig) -> Positions:
        """What a layer with ``rope`` needs for tokens at ``positions [T]`` int32."""
        angle = positions[:, None] * rope.frequencies(config.head_dim)
        cos, sin = jax.lax.platform_dependent(angle, cpu=_turns_in_memory, default=_turns)
        if ((magnitude := rope.magnitudes(config.head_dim)) != 1).any():
            cos, sin = cos * magnitude, sin * magnitude
        growth = None
        if config.query_growth is not None:
            beta, original = config.query_growth
            growth = 1 + beta * jnp.log(1 + (positions // original).astype(jnp.float32))
        return cls(cos, sin, growth)


class Attention(nnx.Module):
    """Grouped-query attention.

    Queries, keys and values are one product, ``[D, K * (G + 2) * H]``: for each key/value head its queries, then its
    key, then its value. It is sharded by key/value head, so that splitting the three moves no data. All matrices have
    two axes, which compilers read without transposing them first.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: Any, forms: Forms, rngs: nnx.Rngs):
        d, n, k, h = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.heads = k, n // k + 2, h
        self.switches = Switches(kind.window, config.attention_scale, config.score_cap)
        self.qkv = Matrix((d, math.prod(self.heads)), dtype, forms("attention.qkv"), rngs)
        self.o = Matrix((n * h, d), dtype, forms("attention.o"), rngs, summed=True)
        self.qkv_bias = nnx.Param(jnp.zeros(math.prod(self.heads), dtype)) if config.qkv_bias else None
        self.o_bias = nnx.Param(jnp.zeros(d, dtype)) if config.o_bias else None
        self.sinks = nnx.Param(jnp.zeros(n, jnp.float32)) if config.sinks else None
        self.q_norm = RMSNorm(config, h, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(config, h, dtype) if config.qk_norm else None

    def __call__(
        self, x: jax.Array, positions: Positions, ops: Operations, layer: Index, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        qkv = ops.multiply(x, self.qkv)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        qkv = qkv.reshape(-1, *self.heads)
        if positions.growth is not None:  # before a rotation, which is linear
            queries = jnp.arange(self.heads[1])[:, None] < self.heads[1] - 2
            qkv = (qkv * jnp.where(queries, positions.growth[:, None, None, None], 1)).astype(qkv.dtype)
        heads = Heads(qkv, positions.cos, positions.sin, switches=self.switches)
        if self.q_norm is not None and self.k_norm is not None:
            q_norm, k_norm = self.q_norm.scale[...], self.k_norm.scale[...]
            heads = dataclasses.replace(heads, q_norm=q_norm, k_norm=k_norm, eps=self.q_norm.eps)
        if self.sinks is not None:
            heads = dataclasses.replace(heads, sinks=self.sinks[...])
        out, cache = ops.attend(layer, heads, cache)
        out = ops.multiply(out.reshape(out.shape[0], -1), self.o)
        return out if self.o_bias is None else out + self.o_bias[...], cache


class Layer(nnx.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: Any, forms: Forms, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config, config.hidden_size, dtype)
        self.attention = Attention(config, kind, dtype, forms, rngs)
        self.post_attention_norm = RMSNorm(config, config.hidden_size, dtype)
        self.mlp: MLP | Mixture = (
            Mixture(config, dtype, forms, rngs)
            if kind.has_experts
            else MLP(config, config.intermediate_size, dtype, forms, rngs)
        )
        sandwich = config.sandwich_norms
        self.attention_out_norm = RMSNorm(config, config.hidden_size, dtype) if sandwich else None
        self.mlp_out_norm = RMSNorm(config, config.hidden_size, dtype) if sandwich else None

    def __call__(
        self, x: jax.Array, positions: Positions, ops: Operations, layer: Index, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        out, cache = self.attention(self.input_norm(x), positions, ops, layer, cache)
        x = x + (out if self.attention_out_norm is None else self.attention_out_norm(out))
        out = self.mlp(self.post_attention_norm(x), ops)
        return x + (out if self.mlp_out_norm is None else self.mlp_out_norm(out)), cache


class Stack(nnx.Module):
    """Layers that repeat, as one period whose arrays are ``[count, …]``, run in a loop that is compiled once.

    It pays where the compiler reads a layer's weights directly from the stack: XLA does so for TPUs, but copies them
    first for GPUs. A period is one layer where all are alike, or as many as it takes until kinds repeat.
    """

    def __init__(self, layers: list[Layer], count: int):
        self.layers, self.count = nnx.List(layers), count

    def __call__(
        self, x: jax.Array, positions: list[Positions], ops: Operations, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        """Run all layers; ``positions`` are those of each layer of a period."""
        graph, arrays = nnx.split(self.layers)

        def body(carry: tuple[jax.Array, LayerCache], each: Any) -> tuple[tuple[jax.Array, LayerCache], None]:
            i, of_one = each
            layers: nnx.List[Layer] = nnx.merge(graph, of_one)
            for matrix, whole in zip(_matrices(layers), _matrices(nnx.merge(graph, arrays)), strict=True):
                matrix.stack = InStack(whole, i)
            x, cache = carry
            for nth, layer in enumerate(layers):
                x, cache = layer(x, positions[nth], ops, i * len(layers) + nth, cache)
            return (x, cache), None

        with jax.named_scope("layers"):
            carry, _ = jax.lax.scan(body, (x, cache), (jnp.arange(self.count), arrays))
        return carry


def _matrices(layers: nnx.List[Layer]) -> list[Matrix]:
    return [module for _, module in nnx.iter_modules(layers) if isinstance(module, Matrix)]


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
        forms: forms of the layers' matrices.
        rngs: source of the random initial weights.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.bfloat16, forms: Forms = plain, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config, dtype, rngs)
        self.layers: nnx.List[Layer] | Stack = nnx.List(
            [
                Layer(config, kind, dtype, within(forms, f"layers.{i}"), rngs)
                for i, kind in enumerate(config.layer_kinds)
            ]
        )
        self.norm = RMSNorm(config, config.hidden_size, dtype)
        if not config.tie_embeddings:
            self.lm_head = Head(config, dtype, rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, cache: Any, ops: Operations, *, dtype: Any = None
    ) -> tuple[jax.Array, Any]:
        """Run ``tokens [T]`` int32 at ``positions [T]`` int32; return the final hidden states ``[T, D]`` and the cache.

        Activations are in ``dtype``; None: in that of the embedding.

        ``cache`` is a sequence with the cache of each layer, or one cache of all layers if they are stacked;
        ``ops.attend`` is given the one or the other.
        """
        kinds = self.config.layer_kinds
        ropes = dict.fromkeys(kind.rope for kind in kinds)
        where = {rope: Positions.of(positions, rope, self.config) for rope in ropes}
        x = self._embedded(tokens, dtype)
        if isinstance(self.layers, Stack):
            x, cache = self.layers(x, [where[kind.rope] for kind in kinds[: len(self.layers.layers)]], ops, cache)
            return self.norm(x), cache

        @partial(jax.jit, static_argnums=0)  # layers alike are traced once; what is compiled is the same
        def run(
            graph: Any, arrays: Any, i: jax.Array, x: jax.Array, positions: Positions, cache: LayerCache
        ) -> tuple[jax.Array, LayerCache]:
            layer: Layer = nnx.merge(graph, arrays)
            return layer(x, positions, ops, i, cache)

        caches = []
        for i, (kind, layer) in enumerate(zip(kinds, self.layers, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x, layer_cache = run(*nnx.split(layer), jnp.int32(i), x, where[kind.rope], cache[i])
            caches.append(layer_cache)
        return self.norm(x), tuple(caches)

    def _embedded(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """Embeddings ``[T, D]`` of ``tokens [T]``, in ``dtype`` or their own."""
        weight = self.embed.weight[...]
        own = jnp.bfloat16 if weight.dtype == BITS else weight.dtype
        x = rows(weight, tokens, dtype or own)
        return (
            x if self.config.embedding_scale == 1 else x * jnp.asarray(self.config.embedding_scale, own).astype(x.dtype)
        )

    def keep_bits(self) -> None:
        """Turn matrices of bfloat16 and float8 into integers of their bits (:mod:`.product`), in place, for a CPU."""
        state = nnx.state(self)
        kept = [
            (path, leaf.replace(bits(leaf[...])) if path[-1] in MULTIPLIED and leaf.dtype in BITS_OF else leaf)
            for path, leaf in nnx.to_flat_state(state)
        ]
        nnx.update(self, nnx.from_flat_state(kept))

    @property
    def stacked(self) -> bool:
        """Whether the layers are a :class:`Stack`."""
        return isinstance(self.layers, Stack)

    @property
    def period(self) -> int:
        """Layers of one turn of the loop if they are stacked, else all."""
        return len(self.layers.layers if isinstance(self.layers, Stack) else self.layers)

    def stack(self) -> None:
        """Turn the layers into a :class:`Stack`, unless they are one.

        Layers whose kinds do not repeat stay as they are. A parameter's arrays are freed once they are stacked, so this
        needs extra memory for the largest one only.
        """
        if isinstance(self.layers, Stack) or (period := self._period()) is None:
            return
        layers, self.layers = list(self.layers), nnx.List([])
        count = len(layers) // period
        graphs = [nnx.graphdef(layer) for layer in layers[:period]]
        states = [dict(nnx.to_flat_state(nnx.state(layer))) for layer in layers]
        del layers
        stacked = []
        for nth, graph in enumerate(graphs):
            alike = states[nth::period]
            of_one = [
                (path, leaf.replace(jnp.stack([state.pop(path)[...] for state in alike])))
                for path, leaf in list(alike[0].items())
            ]
            stacked.append(nnx.merge(graph, nnx.from_flat_state(of_one)))
        self.layers = Stack(stacked, count)

    def _period(self) -> int | None:
        """The number of layers after which kinds repeat, to the end; None: they do not."""
        assert not isinstance(self.layers, Stack)
        layers = [(kind, nnx.graphdef(layer)) for kind, layer in zip(self.config.layer_kinds, self.layers, strict=True)]
        count = len(layers)
        periods = [n for n in range(1, max(1, count // 2) + 1) if count % n == 0]
        return next((n for n in periods if layers[n:] == layers[:-n]), None)

    def logits(self, hidden: jax.Array, product: Callable[..., jax.Array] = product) -> jax.Array:
        """Logits of the next token, ``[T, D] -> [T, V]`` float32; ``product`` as in :class:`.operations.Operations`."""
        tied, cap = self.config.tie_embeddings, self.config.logit_cap
        logits = product(hidden, (self.embed if tied else self.lm_head).weight[...], transposed=tied)
        logits = logits[:, : self.config.vocab_size]
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _normal(shape: tuple[int, ...], dtype: Any, rngs: nnx.Rngs) -> nnx.Param[Any]:
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
