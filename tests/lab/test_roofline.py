"""Roofline: rates are what arrays of known size take, and work is what the model's shapes say."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.layout import Layout
from astraea_jax.lab.roofline import Roofline, Work, best_seconds
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.sharding import default_mesh


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-0.6b"])
def test_weights_are_those_of_the_decoder(shape):
    c = replace(PUBLISHED[shape], num_layers=3)
    state = jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(Decoder(c, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))))
    matrices = sum(x.size for x in state if x.ndim > 1)
    assert c.layer_weights + c.table_weights == matrices


def test_work_grows_as_it_should():
    c = PUBLISHED["llama-3.1-8b"]
    alone, shared = Work(c, 16 * 10**9, 131_072), Work(c, 16 * 10**9, 131_072, devices=4)
    assert alone.decode_bytes(3, 10) == 48 * 10**9 + 10 * 131_072 == 4 * shared.decode_bytes(3, 10)
    one, two = alone.prefill_operations([100]), alone.prefill_operations([200])
    assert alone.prefill_operations([100, 100]) == 2 * one == 4 * shared.prefill_operations([100, 100])
    assert two - 2 * (one - 2 * c.vocab_size * c.hidden_size) > 0  # attention grows with the square


def test_eight_bits_are_half_of_sixteen():
    c, head = PUBLISHED["qwen3-0.6b"], 151_936 * 1024
    config = EngineConfig(dtype="bfloat16", kv_bytes=2**26, max_context=64)
    narrow = replace(config, quantize="int8", kv_dtype="fp8")
    wide, eight = (Work.of(c, one, Layout.plan(one, c, default_mesh())) for one in (config, narrow))
    assert wide.weights == 2 * (c.layer_weights + head)
    assert eight.weights == c.layer_weights + 2 * head
    assert wide.kv_token == 2 * eight.kv_token == 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim


def test_rates_turn_into_seconds():
    roofline = Roofline(read_gb_s=2.0, copy_gb_s=1.0, matmul_tflop_s=0.5)
    assert roofline.read_s(1e9) == 0.5
    assert roofline.matmul_s(1e12) == 2.0


def test_the_shortest_run_counts():
    runs = []

    def run():
        runs.append(None)
        return jnp.zeros(1)

    assert 0 < best_seconds(run, repeats=3, queued=2) < 1
    assert len(runs) == 1 + 3 * 2
