"""A random model with layers that see only the last tokens, and what it must say, by dense attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from astraea_jax.engine.mixtures import operations
from astraea_jax.kernels import Reference
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.sharding import abstract_decoder, default_mesh


def windowed_decoder(model: ModelConfig, window: int, sliding: tuple[int, ...], layers: int = 2) -> Decoder:
    """Weights large enough that greedy choices differ clearly."""
    config = dataclasses.replace(model, num_layers=layers, window=window, sliding=sliding)
    draw = np.random.default_rng(0).standard_normal
    graph, state = nnx.split(abstract_decoder(config, jnp.float32, default_mesh()))
    fill = lambda x: jnp.asarray(0.16 * draw(x.shape) if len(x.shape) > 1 else np.ones(x.shape), x.dtype)  # noqa: E731
    decoder: Decoder = nnx.merge(graph, jax.tree.map(fill, state))
    return decoder


def greedy_of(decoder: Decoder, length: int = 128) -> Callable[..., list[int]]:
    """Like the fixture ``greedy``, for texts up to ``length`` tokens of a model with windows or experts."""
    graph, state = nnx.split(decoder)
    layers = decoder.config.num_layers

    def attend(_, heads, cache):
        q, k, v = heads.rotated()
        at, window = jnp.arange(length), heads.switches.window or length
        seen = (at <= at[:, None]) & (at > at[:, None] - window)
        return jax.nn.dot_product_attention(q[None], k[None], v[None], mask=seen[None, None])[0], cache

    ops = operations(attend, Reference(), default_mesh())

    @jax.jit
    def likeliest(state, tokens):
        model = nnx.merge(graph, state)
        hidden, _ = model(tokens, jnp.arange(length), (None,) * layers, ops)
        return model.logits(hidden).argmax(-1)

    def generate(prompt: list[int], n: int, guess: list[int] | tuple[int, ...] = ()) -> list[int]:
        text = [*guess[:n], *[0] * (n - len(guess))]
        while True:
            padded = np.zeros(length, np.int32)
            padded[: len(prompt) + n] = [*prompt, *text]
            better = np.asarray(likeliest(state, padded))[len(prompt) - 1 : len(prompt) + n - 1].tolist()
            if text == better:
                return text
            text = better

    return generate
