"""The step without any array: what moves between devices, what is donated, and how models are packed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.wide import WIDE, wide_decoder

from astraea_jax.engine.step import Step, StepShape, StepSizes, step_shapes
from astraea_jax.kernels import Reference
from astraea_jax.kv_cache.offload import NOWHERE
from astraea_jax.models.sharding import abstract_decoder, mesh_of

SIZES = StepSizes(
    num_pages=16, page_size=4, max_seqs=4, max_step_tokens=16, max_pages_per_seq=8, kv_dtype=jnp.dtype("float32")
)
COLLECTIVE = re.compile(r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def test_shapes_are_few_and_reach_the_largest_step():
    assert step_shapes(4, 16, 8) == (StepShape(4, 4, 1), StepShape(16, 4, 16))
    assert [s.tokens for s in step_shapes(64, 512, 8)] == [8, 16, 32, 64, 64, 128, 256, 512]
    assert [s.tokens for s in step_shapes(64, 512, 1)] == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512]
    assert [s.tokens for s in step_shapes(12, 64, 1) if s.q_tile == 1] == [1, 2, 4, 8, 12]


@pytest.mark.parametrize("stacked", [False, True])
def test_only_sums_move_between_devices(stacked):
    """Compiled from shapes alone: two sums per layer, or of the loop over them, and one of the embedding, [T, D] each;
    then scores change hands from shares of the vocabulary to shares of the rows. No device asks for the weights or the
    KV of another."""
    mesh = mesh_of(jax.devices()[:2])
    step = Step(abstract_decoder(WIDE, jnp.float32, mesh, stacked=stacked), Reference(), SIZES, mesh)
    shape = StepShape(4, 4, 1)
    compiled = step.jitted(shape).lower(*step.arguments(shape)).compile()
    moves = Counter()
    for result, kind in COLLECTIVE.findall(compiled.as_text()):
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", result)]
        moves[kind, max(sizes)] += 1
    tokens_times_hidden = shape.tokens * WIDE.hidden_size
    assert moves.pop(("all-reduce", tokens_times_hidden)) == 2 * (1 if stacked else WIDE.num_layers) + 1
    assert max(size for _, size in moves) <= shape.rows * WIDE.vocab_size // mesh.size, moves
    pages = sum(math.prod(layer.shape) for layer in step.pages) * 4 // mesh.size
    assert compiled.memory_analysis().alias_size_in_bytes >= pages, "the pages are meant to be written in place"


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("heads", "kv_dtype"), [(1, "float32"), (1, "bfloat16"), (2, "float32")])
def test_no_step_copies_the_pages(heads, kv_dtype, stacked):
    """They are written in place, also where an axis of theirs has one element only."""
    config = dataclasses.replace(WIDE, num_kv_heads=heads)
    sizes = dataclasses.replace(SIZES, num_pages=2**14, kv_dtype=jnp.dtype(kv_dtype))
    mesh, shape = mesh_of(jax.devices()[:1]), StepShape(4, 4, 1)
    step = Step(abstract_decoder(config, jnp.float32, mesh, stacked=stacked), Reference(), sizes, mesh)
    memory = step.jitted(shape).lower(*step.arguments(shape)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < min(math.prod(layer.shape) * layer.dtype.itemsize for layer in step.pages) / 2


def test_angles_are_computed_once():
    """Not in every layer, for every head."""
    mesh, shape = mesh_of(jax.devices()[:1]), StepShape(16, 4, 16)
    step = Step(abstract_decoder(WIDE, jnp.float32, mesh), Reference(), SIZES, mesh)
    compiled = step.jitted(shape).lower(*step.arguments(shape)).compile()
    assert compiled.as_text().count(" cosine(") == 1


def test_a_packed_model_is_the_model():
    """Its vectors travel as one argument, and come apart again; on the devices they are meant for."""
    mesh = mesh_of(jax.devices()[4:6])
    decoder = wide_decoder()
    step = Step(decoder, Reference(), SIZES, mesh)
    packed = step.pack(decoder)
    assert [(x.shape, x.dtype, x.sharding) for x in packed] == [(x.shape, x.dtype, x.sharding) for x in step.leaves]
    alone = sum(x.ndim == 1 and not x.sharding.is_fully_replicated for x in step.leaves)
    assert alone == WIDE.num_layers, "biases are divided, and travel by themselves"
    assert sum(x.ndim == 1 for x in packed) == 1 + alone
    again = step._decoder(packed)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(decoder), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_that_sample_get_their_tokens_whether_few_or_all_sample():
    """With a prompt in the step, a CPU computes the logits of eight rows if no more sample."""
    mesh, rows = mesh_of(jax.devices()[:1]), 12
    decoder = wide_decoder()
    sizes = dataclasses.replace(SIZES, max_seqs=rows, max_step_tokens=64)
    step = Step(decoder, Reference(), sizes, mesh)
    shape = step.shapes[-1]
    run, leaves = step.jitted(shape).lower(*step.arguments(shape)).compile(), step.pack(decoder)

    def sampled(samples):
        packed = np.zeros(shape.packed_size, np.int32)
        tokens, head, updates = shape.unpacked(packed)
        updates[:] = NOWHERE
        tokens[: 3 * rows] = np.arange(3 * rows) % WIDE.vocab_size
        head[:, 0], head[:, 2], head[:samples, 3] = np.arange(rows), 3, 1
        table = jnp.arange(1, rows + 1)[:, None] * jnp.ones((1, sizes.max_pages_per_seq), jnp.int32)
        pages = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), step.pages)
        return run(leaves, pages, jnp.full(rows, -1, jnp.int32), table.astype(jnp.int32), packed)

    _, last, _, tokens, logits = sampled(rows)
    assert tokens.min() >= 0
    np.testing.assert_array_equal(last, tokens)
    for few in (0, 1, 8, 9):
        _, last, _, some, scores = sampled(few)
        np.testing.assert_array_equal(some[:few], tokens[:few])
        np.testing.assert_array_equal(last, [*tokens[:few].tolist(), *[-1] * (rows - few)])
        np.testing.assert_allclose(scores[:few], logits[:few], rtol=1e-5, atol=1e-5)
