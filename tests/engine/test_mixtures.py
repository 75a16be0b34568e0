"""Engines with mixtures of experts: what they say does not depend on batch, chunks, preemption, offload or devices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.wide import MIXED, PAGE_BYTES, TIGHT, run_programs, wide_decoder

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.mixtures import operations
from astraea_jax.engine.step import Step, StepShape, StepSizes
from astraea_jax.kernels import Reference
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.formats import Format
from astraea_jax.models.matrix import everywhere
from astraea_jax.models.sharding import abstract_decoder, mesh_of
from astraea_jax.models.tokenizer import Tokenizer

EXPERTS = MIXED.experts
assert EXPERTS is not None
MODELS = {
    "experts": MIXED,
    "features": dataclasses.replace(MIXED, experts=dataclasses.replace(EXPERTS, count=6, biases=True, shared_size=0)),
}
"""By what four devices divide of a mixture."""
SIZES = StepSizes(
    num_pages=16, page_size=4, max_seqs=4, max_step_tokens=16, max_pages_per_seq=8, kv_dtype=jnp.dtype("float32")
)
COLLECTIVE = re.compile(r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def engine(config, folder, **options):
    sizes = {"kv_bytes": 40 * PAGE_BYTES, "host_kv_bytes": 80 * PAGE_BYTES, "residency": "always-offload"}
    made = Engine(
        wide_decoder(config), Tokenizer.from_folder(folder), dataclasses.replace(TIGHT, **{**sizes, **options})
    )
    made.start()
    return made


@pytest.mark.parametrize("divided", MODELS)
def test_programs_say_the_same_alone_together_and_on_four_devices(divided, random_folder):
    """Together they are prefilled in chunks, preempted, and their KV goes to the host and comes back."""
    one = engine(MODELS[divided], random_folder)
    alone, together = run_programs(one, alone=True), run_programs(one)
    stats = one.stats()
    one.shutdown(grace_s=0)
    four = engine(MODELS[divided], random_folder, tensor_parallel=4, kv_bytes=10 * PAGE_BYTES, scan_layers=True)
    shared = run_programs(four)
    four.shutdown(grace_s=0)
    assert alone == together == shared
    assert min(stats.offloaded_pages, stats.restored_pages, stats.preemptions) > 0, "the pool was meant to be small"
    assert len({tuple(said) for said in alone}) > 5, "programs were meant to differ"


@pytest.mark.parametrize("divided", MODELS)
def test_one_sum_moves_per_mixture(divided):
    mesh = mesh_of(jax.devices()[:4])
    step = Step(abstract_decoder(MODELS[divided], jnp.float32, mesh), Reference(), SIZES, mesh)
    shape = StepShape(4, 4, 1)
    compiled = step.jitted(shape).lower(*step.arguments(shape)).compile().as_text()
    moves = Counter()
    for result, kind in COLLECTIVE.findall(compiled):
        sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", result)]
        moves[kind, max(sizes)] += 1
    # That of attention and that of the mixture, in each layer; one of the embedding.
    assert moves.pop(("all-reduce", shape.tokens * MIXED.hidden_size)) == 2 * MIXED.num_layers + 1
    assert max(size for _, size in moves) <= shape.rows * MIXED.vocab_size // mesh.size, moves


SHARES = {
    "groups of inputs": (Format("int8", inputs=16), {}),
    "as many blocks as devices, but others": (Format("fp8", 64, 8), {"size": 96}),
    "half a block of packed codes": (Format("int4"), {"size": 96}),
    "shared experts": (Format("int4", 32), {"count": 8, "shared_size": 96}),
}


@pytest.mark.parametrize("case", SHARES)
def test_a_share_without_its_scales_is_refused(case):
    form, fields = SHARES[case]
    mesh = mesh_of(jax.devices()[: 4 if case == "groups of inputs" else 2])
    assert MIXED.experts is not None
    experts = dataclasses.replace(MIXED.experts, **{"count": 7, "shared_size": 0, **fields})
    decoder: Any = abstract_decoder(
        dataclasses.replace(MIXED, experts=experts), jnp.float32, mesh, forms=everywhere(form)
    )
    x, index = jnp.zeros((1, MIXED.hidden_size)), jnp.zeros((1, experts.chosen), jnp.int32)
    ops: Any = operations(lambda *_: None, Reference(), mesh)
    with pytest.raises(CheckpointError, match="no whole blocks; choose a smaller tensor_parallel"):
        ops.mixed(x, index, index * 1.0, decoder.layers[0].mlp)
