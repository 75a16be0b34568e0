"""A model on several (simulated) devices says what it says on one, under every pressure; and what cannot be shared."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from support.grammars import EVEN
from support.sizes import SMALL
from support.wide import PAGE_BYTES, PROMPTS, TIGHT, WIDE, run_programs, tokens, wide_decoder

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.replicas import load_engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import StartupError
from astraea_jax.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def shared(random_folder) -> Iterator[Engine]:
    """Four devices, each with its quarter of a pool that is too small, and a host tier; the layers are one loop. (Those
    of test_multiprocess.py are unrolled.)"""
    sizes = {"kv_bytes": TIGHT.kv_bytes // 4, "host_kv_bytes": 80 * PAGE_BYTES}
    config = dataclasses.replace(TIGHT, tensor_parallel=4, residency="always-offload", scan_layers=True, **sizes)
    engine = Engine(wide_decoder(), Tokenizer.from_folder(random_folder), config)
    engine.start()
    yield engine
    engine.shutdown(grace_s=0)


@pytest.mark.serves("native", "tested", "tensor parallelism", "layers in one loop")
def test_four_devices_say_what_one_says(shared, wide_engine):
    """In chunks of prefill, preempted, and with KV that went to the host and came back in four parts."""
    assert run_programs(shared) == run_programs(wide_engine, alone=True)
    stats = shared.stats()
    assert min(stats.offloaded_pages, stats.restored_pages, stats.preemptions) > 0, "the pool was meant to be small"
    assert stats.failed_transfers == 0


def test_no_device_has_the_whole(shared):
    runner = shared._runner
    assert shared.layout.num_pages == 40
    assert shared.layout.page_bytes == PAGE_BYTES
    for array in (*runner._pages, *runner._leaves):
        parts = {shard.device: shard.data.size for shard in array.addressable_shards}
        assert set(parts) == set(jax.devices()[:4])
        norms = array.shape in ((WIDE.hidden_size,), (WIDE.num_layers, WIDE.hidden_size))
        assert set(parts.values()) == {array.size // (1 if norms else 4)}


def test_draws_are_those_of_one_device(shared, wide_engine):
    """Rows are sampled on different devices, from the seed alone."""
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, top_k=50, seed=3)

    async def draw(engine):
        return await asyncio.gather(*[tokens(engine.generate(prompt, params)) for prompt in PROMPTS[:4]])

    assert asyncio.run(draw(shared)) == asyncio.run(draw(wide_engine))


def test_rows_drawn_again_are_those_of_one_device(shared, wide_engine):
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True, grammar=EVEN, temperature=1.0, seed=3),
        SamplingParams(max_tokens=12, ignore_eos=True, repetition_penalty=1.4, frequency_penalty=0.5, logprobs=2),
    ]

    async def draw(engine):
        work = [engine.generate(prompt, params[i % 2]) for i, prompt in enumerate(PROMPTS[:6])]
        deltas = [[delta async for delta in generation] for generation in work]
        reported = [one.logprob for said in deltas for delta in said for one in delta.logprobs]
        return [[t for delta in said for t in delta.token_ids] for said in deltas], reported

    (ours, reported), (theirs, expected) = asyncio.run(draw(shared)), asyncio.run(draw(wide_engine))
    assert ours == theirs
    assert len(reported) == 36
    np.testing.assert_allclose(reported, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        (
            {"tensor_parallel": 16},
            r"tensor_parallel 16 times data_parallel 1 makes 16 devices, and there are 8 .*JAX_NUM_CPU_DEVICES=16 ",
        ),
        ({"tensor_parallel": 4, "data_parallel": 3}, r"makes 12 devices, and there are 8"),
        ({"tensor_parallel": 4}, r"key/value heads \(2\) is no multiple of 4; choose a tensor_parallel of 1, 2$"),
    ],
)
def test_what_cannot_be_shared_is_told_at_once(parallel, said, random_folder):
    with pytest.raises(StartupError, match=said):
        load_engine(random_folder, dataclasses.replace(SMALL, **parallel))


def test_an_engine_is_one_copy(random_folder):
    with pytest.raises(StartupError, match="data_parallel 2 asks for more"):
        Engine.from_folder(random_folder, EngineConfig(data_parallel=2))


def test_a_vocabulary_that_does_not_divide_is_announced(caplog):
    EngineConfig(tensor_parallel=4).meshes(dataclasses.replace(WIDE, vocab_size=261))
    assert "4 devices do not divide the 261 tokens" in caplog.text
