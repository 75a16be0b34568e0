"""A random model that several devices can share, four key/value heads, and programs for it."""

import asyncio
import dataclasses
import random
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from support.engines import gathering

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.interface import Serving
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.rpc.client import Client
from astraea_jax.models.config import Experts, ModelConfig
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.formats import Format
from astraea_jax.models.matrix import everywhere
from astraea_jax.models.parameters import fill_all, matrix_forms
from astraea_jax.models.sharding import abstract_decoder, default_mesh

WIDE = ModelConfig(
    vocab_size=260,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_position=256,
    tie_embeddings=False,
    qkv_bias=True,
)
MIXED = dataclasses.replace(WIDE, experts=Experts(8, 3, 32, shared_size=48))
"""Eight experts and a shared one, which four devices share."""
PAGE_BYTES = 4096
"""Bytes of a page of four tokens in float32."""
TIGHT = EngineConfig(
    max_seqs=4, max_step_tokens=16, page_size=4, max_context=96, kv_bytes=40 * PAGE_BYTES, dtype="float32"
)
"""Forty pages, on one device: less than four running requests want."""


def wide_decoder(config: ModelConfig = WIDE, form: Format | None = None) -> Decoder:
    """Weights and biases large enough that greedy choices differ clearly, in a form if there is one. (NumPy draws
    them: nothing is compiled.)"""
    draw = np.random.default_rng(0).standard_normal
    graph, state = nnx.split(abstract_decoder(config, jnp.float32, default_mesh()))
    decoder: Decoder = nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.16 * draw(x.shape), x.dtype), state))
    for path, leaf in nnx.to_flat_state(nnx.state(decoder)):
        if path[-1] == "scale":
            leaf[...] = jnp.ones(leaf.shape)
    if form is None:
        return decoder
    narrow = abstract_decoder(config, jnp.float32, default_mesh(), forms=everywhere(form))
    graph, state = nnx.split(narrow)
    params = dict(nnx.to_flat_state(state))
    fill_all(params, dict(nnx.to_flat_state(nnx.state(decoder))), matrix_forms(narrow))
    decoder = nnx.merge(graph, nnx.from_flat_state(params))
    return decoder


_rng = random.Random(1)
PROMPTS = [[_rng.randrange(256) for _ in range(_rng.randint(1, 50))] for _ in range(10)]
FIRST, SECOND = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (28, 16)]
"""Of the two requests of a program. Any four of the first want more than the forty pages of :data:`TIGHT` before one
has ended, and all programs together four times as many: so requests are preempted, and KV goes to the host and comes
back, whatever takes how long."""


async def tokens(generation) -> list[int]:
    return [t async for delta in generation for t in delta.token_ids]


async def programs(model: Serving | Client) -> list[list[int]]:
    """Return what ten programs of two requests each say; the first ones of all are asked at once, and then the second
    ones.
    """

    async def turn(prompts: list[list[int]], params: SamplingParams, *, final: bool) -> list[list[int]]:
        with nullcontext() if isinstance(model, Client) else gathering(model):
            asked = [model.generate(p, params, session=f"p{i}", final=final) for i, p in enumerate(prompts)]
        return await asyncio.gather(*map(tokens, asked))

    first = await turn(PROMPTS, FIRST, final=False)
    longer = [[*prompt, *said, 7, 8] for prompt, said in zip(PROMPTS, first, strict=True)]
    second = await turn(longer, SECOND, final=True)
    return [before + after for before, after in zip(first, second, strict=True)]


async def programs_alone(model: Serving) -> list[list[int]]:
    """Return what each of these programs says if it has the model to itself."""
    said = []
    for i, prompt in enumerate(PROMPTS):
        first = await tokens(model.generate(prompt, FIRST, session=f"p{i}"))
        second = await tokens(model.generate([*prompt, *first, 7, 8], SECOND, session=f"p{i}", final=True))
        said.append(first + second)
    return said


def run_programs(engine: Serving, *, alone: bool = False) -> list[list[int]]:
    """:func:`programs` or :func:`programs_alone`, in an event loop of their own."""
    return asyncio.run(programs_alone(engine) if alone else programs(engine))
