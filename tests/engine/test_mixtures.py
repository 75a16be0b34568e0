"""Engines with mixtures of experts: what they say does not depend on batch, chunks, preemption, offload or devices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.wide import MIXED, PAGE_BYTES, TIGHT, run_programs, wide_decoder

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.mixtures import operations
from astraea_jax.engine.step import Step, StepShape, StepSizes
from astraea_jax.kernels import Reference
from astraea_jax.kernels.native.attention import Native
from astraea_jax.kernels.native.products import put_in_panels
from astraea_jax.models.experts import Mixture
from astraea_jax.models.formats import Format
from astraea_jax.models.sharding import abstract_decoder, default_mesh, mesh_of
from astraea_jax.models.tokenizer import Tokenizer

EXPERTS = MIXED.experts
assert EXPERTS is not None
MODELS = {
    "experts": MIXED,
    "features": dataclasses.replace(MIXED, experts=dataclasses.replace(EXPERTS, count=6, biases=True, shared_size=0)),
}
"""By what four devices divide of a mixture."""


SHARED = dataclasses.replace(MIXED, experts=dataclasses.replace(EXPERTS, size=64, shared_size=96))
CASES = {name: (config, None) for name, config in MODELS.items()} | {
    "experts in int4 beside shared ones that are not divided": (SHARED, Format("int4", 32, scales="bfloat16")),
    "features in fp8": (MODELS["features"], Format("fp8")),
}
"""Models, and the form of their matrices. (MXFP4 is that of test_engine_gpt_oss.py.)"""
SIZES = StepSizes(
    num_pages=16, page_size=4, max_seqs=4, max_step_tokens=16, max_pages_per_seq=8, kv_dtype=jnp.dtype("float32")
)
COLLECTIVE = re.compile(r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def engine(config, form, folder, **options):
    sizes = {"kv_bytes": 40 * PAGE_BYTES, "host_kv_bytes": 80 * PAGE_BYTES, "residency": "always-offload"}
    made = Engine(
        wide_decoder(config, form), Tokenizer.from_folder(folder), dataclasses.replace(TIGHT, **{**sizes, **options})
    )
    made.start()
    return made


@pytest.mark.parametrize("model", MODELS)
def test_padding_is_nobodys(model):
    """On CPUs rows of padding cost as much as others, so no expert gets them."""
    decoder = wide_decoder(MODELS[model], None)
    put_in_panels(decoder)
    mixture = next(module for _, module in nnx.iter_modules(decoder) if isinstance(module, Mixture))
    x = jax.random.normal(jax.random.key(0), (8, MODELS[model].hidden_size))
    index, weights = mixture.routed(x)
    ops = operations(nobody_attends, Native(), default_mesh())
    used = operations(nobody_attends, Native(), default_mesh(), jnp.int32(3), jnp.int32(3))
    whole, padded = (one.mixed(x, index, weights, mixture) for one in (ops, used) if one.mixed)
    np.testing.assert_array_equal(padded[:3], whole[:3])
    assert not np.asarray(padded[3:]).any(), "an expert, even a shared one, has got a row of padding"


def nobody_attends(*_):
    raise AssertionError("there is no attention")


@pytest.mark.parametrize("case", CASES)
def test_programs_say_the_same_alone_together_and_on_four_devices(case, random_folder):
    """Together they are prefilled in chunks, preempted, and their KV goes to the host and comes back."""
    model, form = CASES[case]
    one = engine(model, form, random_folder)
    alone, together = run_programs(one, alone=True), run_programs(one)
    stats = one.stats()
    one.shutdown(grace_s=0)
    four = engine(model, form, random_folder, tensor_parallel=4, kv_bytes=10 * PAGE_BYTES, scan_layers=True)
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
