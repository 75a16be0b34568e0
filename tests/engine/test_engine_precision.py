"""The engine with eight-bit weights and KV: tokens are those of the same rounding without pages, batches and chunks."""

from __future__ import annotations

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.engines import settled, together
from support.sizes import NARROW, PAGE_BYTES

from astraea_jax.engine import config as config_module
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.layout import Layout
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import StartupError
from astraea_jax.models.checkpoint import load_hf
from astraea_jax.models.formats import Format
from astraea_jax.models.operations import Operations
from astraea_jax.models.sharding import default_mesh
from astraea_jax.scheduler.wait import Wait

LENGTH = 96
INT8_ALL = dataclasses.replace(
    NARROW,
    quantize="int8",
    kv_dtype="fp8",
    kv_bytes=48 * PAGE_BYTES // 4,
    host_kv_bytes=100 * PAGE_BYTES,
    residency="infercept",
)
"""The pages of NARROW in a quarter of the memory, and a host tier."""
FP8_WEIGHTS = dataclasses.replace(NARROW, quantize="fp8", scan_layers=True)
BFLOAT16 = dataclasses.replace(NARROW, dtype="bfloat16", kv_bytes=48 * PAGE_BYTES // 2)


async def tokens(engine, prompt, n, **more) -> list[int]:
    params = SamplingParams(max_tokens=n, ignore_eos=True)
    return [t async for delta in engine.generate(prompt, params, **more) for t in delta.token_ids]


def likeliest(folder, config):
    """``(text) -> the likeliest token after each of its tokens``, by dense attention over rounded keys and values."""
    decoder = load_hf(folder, config.weight_dtype(), quantize=config.quantized())
    graph, state = nnx.split(decoder)
    kv_dtype = config.page_dtype()

    def attend(_, heads, cache):
        q, k, v = heads.rotated()
        k, v = (x.astype(kv_dtype).astype(jnp.float32) for x in (k, v))
        return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0], cache

    @jax.jit
    def follow(state, text):
        model = nnx.merge(graph, state)
        hidden, _ = model(
            text, jnp.arange(LENGTH), (None,) * model.config.num_layers, Operations(attend), dtype=jnp.float32
        )
        return model.logits(hidden).argmax(-1)

    return lambda text: np.asarray(follow(state, np.array(text + [0] * (LENGTH - len(text)), np.int32)))


@pytest.mark.serves("native", "tested", "int8 and fp8 weights", "fp8 KV")
@pytest.mark.serves("reference", "tested", "int8 and fp8 weights", "fp8 KV", "layers in one loop")
@pytest.mark.parametrize(
    "config",
    [
        INT8_ALL,
        dataclasses.replace(INT8_ALL, attention="reference"),
        dataclasses.replace(FP8_WEIGHTS, attention="reference"),
        # Keys are compared after rounding, and those of `native` differ in the last digit of their norm.
        dataclasses.replace(BFLOAT16, attention="reference"),
    ],
    ids=["int8 weights, fp8 KV", "the same, reference", "fp8 weights, reference", "bfloat16, reference"],
)
async def test_tokens_do_not_depend_on_batch_chunks_preemption_or_moves(config, make_engine, random_folder):
    engine, follow, rng = make_engine(config), likeliest(random_folder, config), random.Random(0)
    work = [[rng.randrange(256) for _ in range(rng.randint(1, 50))] for _ in range(16)]

    async def program(number: int, text: list[int]) -> None:
        for turn in range(2):
            output = await tokens(engine, text, 16, session=f"{number}", final=turn == 1)
            whole = text + output
            assert output == follow(whole)[len(text) - 1 : len(whole) - 1].tolist()
            text = [*whole, 7]
            engine.waits(f"{number}", Wait(("slow",)))

    await together(engine, *(program(i, text) for i, text in enumerate(work)))
    await settled(engine, programs=True)
    assert engine.stats().preemptions > 0, "the pool was meant to be too small"
    assert engine.stats().free_pages == engine.layout.num_pages - 1
    if config.host_kv_bytes:
        assert engine.stats().restored_pages > 0, "KV was meant to come back from the host"


def test_pages_of_a_byte_are_so_in_memory_and_in_the_sums(make_engine):
    engine = make_engine(INT8_ALL)
    assert engine.layout.page_bytes == PAGE_BYTES // 4
    pages = sum(x.nbytes for x in engine._runner._pages)
    assert pages == engine.layout.num_pages * PAGE_BYTES // 4
    wide = make_engine(NARROW)
    assert engine.layout.num_pages == wide.layout.num_pages
    assert sum(x.nbytes for x in wide._runner._pages) == 4 * pages


def test_a_device_without_such_numbers_is_named(engine, monkeypatch):
    """No such device runs the tests, so its compiler is played."""
    with monkeypatch.context() as patch:
        patch.setattr(config_module.jax, "jit", lambda _: lambda numbers: numbers + 1)
        with pytest.raises(StartupError, match="cannot compute with float8_e4m3fn"):
            Layout.plan(EngineConfig(kv_dtype="fp8"), engine.model_config, default_mesh())
        with pytest.raises(StartupError, match="start without --quantize"):
            EngineConfig(quantize="int8").quantized()
    assert EngineConfig(quantize="int8").quantized() == Format("int8")
