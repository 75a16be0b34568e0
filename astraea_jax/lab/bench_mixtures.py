"""Compares the layers of a mixture of experts with those of dense models, in turns, without attention itself and head.

Decode steps stand beside a dense model that reads the same bytes, those of all experts that the step uses; prefill
beside one with as many features as a token sees.

  python scripts/bench_mixtures.py                                        moe-1b-a0.3b in float32
  python scripts/bench_mixtures.py --dtype=bfloat16 --batches=1,8,32
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.mixtures import operations
from astraea_jax.engine.step import COMPILER_OPTIONS
from astraea_jax.frontends.flags import run_main
from astraea_jax.kernels import Native
from astraea_jax.kernels.native.products import put_in_panels
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.roofline import Roofline
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.heads import Heads
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.sharding import mesh_of

FLAGS = flags.FLAGS
flags.DEFINE_string("shape", "moe-1b-a0.3b", "A published shape with experts.")
flags.DEFINE_integer("layers", 4, "Layers of it.", lower_bound=1)
flags.DEFINE_list("batches", ["1", "8", "32"], "Rows of decode steps.")
flags.DEFINE_integer("prefill", 512, "Tokens of the prefill.", lower_bound=1)
flags.DEFINE_integer("turns", 15, "Measurements of each, in turns; the median counts.", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the weights.")
define_flags("bench_mixtures")


def layers(config: ModelConfig) -> Callable[[int], float]:
    """A function from a number of tokens to the seconds that its layers take."""
    mesh, platform = mesh_of(jax.devices()[:1]), jax.devices()[0].platform
    backend = EngineConfig().backend(config)
    decoder = Decoder(config, dtype=jnp.dtype(FLAGS.dtype), rngs=nnx.Rngs(0))
    if platform == "cpu":
        decoder.keep_bits()
    if isinstance(backend, Native):
        put_in_panels(decoder)
    graph, state = nnx.split(decoder)

    def attend(_: Any, heads: Heads, cache: Any) -> tuple[jax.Array, Any]:
        queries = heads.qkv[:, :, :-2]
        return queries.reshape(len(queries), -1, queries.shape[-1]), cache

    ops = operations(attend, backend, mesh)

    @partial(jax.jit, compiler_options=COMPILER_OPTIONS.get(platform))
    def run(state: Any, tokens: jax.Array) -> jax.Array:
        merged: Decoder = nnx.merge(graph, state)
        hidden, _ = merged(tokens, tokens, (None,) * config.num_layers, ops, dtype=jnp.float32)
        return hidden

    def seconds(count: int) -> float:
        tokens = jnp.arange(count, dtype=jnp.int32) * 7919 % config.vocab_size
        began = time.perf_counter()
        jax.block_until_ready(run(state, tokens))
        return time.perf_counter() - began

    return seconds


def main(_: list[str]) -> None:
    whole = replace(PUBLISHED[FLAGS.shape], num_layers=FLAGS.layers)
    assert whole.experts is not None, "the shape has no experts"
    experts, rows = whole.experts, []
    share = experts.chosen / experts.count
    mixture = layers(whole)
    for count in (*map(int, FLAGS.batches), FLAGS.prefill):
        decode = count != FLAGS.prefill
        used = experts.count * (1 - (1 - share) ** count) if decode else experts.chosen
        features = round(used) * experts.size + experts.shared_size
        dense = layers(replace(whole, experts=None, intermediate_size=features))
        for each in (mixture, dense):
            each(count)
        ours, theirs = np.median([(mixture(count), dense(count)) for _ in range(FLAGS.turns)], axis=0) * 1e3
        name = f"decode, batch {count}" if decode else f"prefill of {count}"
        rows.append((name, f"{ours:.2f} ms", f"{features}", f"{theirs:.2f} ms", f"{ours / theirs:.2f}"))
    columns = ("", "mixture", "features of the dense model", "dense", "mixture / dense")
    title = f"{FLAGS.layers} layers of {FLAGS.shape}, {FLAGS.dtype}"
    publish("bench_mixtures", [Section(title, columns, rows)], {"rows": rows}, Roofline.measure(jnp.dtype(FLAGS.dtype)))


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
