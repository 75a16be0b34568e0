"""Floors: rates are what arrays of known size take, and work is what the model's shapes say."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from astraea_jax.models.config import PUBLISHED
from astraea_jax.models.decoder import Decoder
from astraea_jax.roofline import Floors, best_seconds, decode_bytes, layer_weights, prefill_operations


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-0.6b"])
def test_weights_are_those_of_the_decoder(shape):
    c = replace(PUBLISHED[shape], num_layers=3)
    state = jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(Decoder(c, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))))
    matrices = sum(x.size for x in state if x.ndim > 1)
    tables = (1 if c.tie_embeddings else 2) * c.vocab_size * c.hidden_size
    assert layer_weights(c) == matrices - tables


def test_work_grows_as_it_should():
    c = PUBLISHED["llama-3.1-8b"]
    weights = layer_weights(c) + c.vocab_size * c.hidden_size
    assert decode_bytes(c, 2, 131_072, 1, 0) == 2 * weights
    assert decode_bytes(c, 2, 131_072, 3, 10) == 6 * weights + 10 * 131_072
    one, two = prefill_operations(c, [100]), prefill_operations(c, [200])
    assert prefill_operations(c, [100, 100]) == 2 * one
    assert two - 2 * (one - 2 * c.vocab_size * c.hidden_size) > 0  # attention grows with the square


def test_rates_turn_into_seconds():
    floors = Floors(read_gb_s=2.0, copy_gb_s=1.0, matmul_tflop_s=0.5)
    assert floors.read_s(1e9) == 0.5
    assert floors.matmul_s(1e12) == 2.0


def test_the_shortest_run_counts():
    runs = []

    def run():
        runs.append(None)
        return jnp.zeros(1)

    assert 0 < best_seconds(run, repeats=3, queued=2) < 1
    assert len(runs) == 1 + 3 * 2
