"""Checks that both parity tests make of a folder with a ``golden.npz``."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import models

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.kernels import Batch, Reference
from astraea_jax.models.checkpoint import load_hf
from astraea_jax.models.operations import Operations
from astraea_jax.models.tokenizer import Tokenizer

CONFIG = EngineConfig(max_seqs=8, max_step_tokens=24, page_size=8, kv_bytes=4 * 2**20, dtype="float32")


def check_logits(folder: Path) -> None:
    """Prefill logits through pages agree within 1e-4 of the largest."""
    golden = np.load(folder / "golden.npz")
    decoder = load_hf(folder, jnp.float32)
    config, prompt = decoder.config, golden["prompt"]
    length, size = len(prompt), CONFIG.page_size
    table = jnp.arange(1, -(-length // size) + 1)[::-1][None]
    at = jnp.arange(length)
    slots = table[0, at // size] * size + at % size
    pages = (jnp.zeros((table.shape[1] + 1, 2, config.num_kv_heads, size, config.head_dim)),) * config.num_layers
    where = Batch(table, jnp.array([length]), jnp.array([0, length]), slots)

    def attend(_, heads, layer):
        return Reference().attend(heads, layer, where, q_tile=16)

    hidden, _ = jax.jit(lambda tokens: decoder(tokens, at, pages, Operations(attend)))(prompt)
    error = np.abs(np.asarray(decoder.logits(hidden)) - golden["logits"]).max() / np.abs(golden["logits"]).max()
    assert error < 1e-4, f"{folder.name}: relative error {error:.1e}"


async def check_tokens(folder: Path) -> None:
    """64 greedy tokens agree exactly, in a batch with other requests and prefilled in chunks between their steps."""
    golden = np.load(folder / "golden.npz")
    blank = Tokenizer(tokenizers.Tokenizer(models.BPE()), bos_id=None, eos_ids=frozenset(), template=None, special={})
    engine = Engine(load_hf(folder, jnp.float32), blank, CONFIG)
    engine.start()
    rng = random.Random(0)
    try:
        others = [
            engine.generate([rng.randrange(100) for _ in range(rng.randint(1, 60))], SamplingParams(max_tokens=48))
            for _ in range(12)
        ]
        mine = engine.generate(golden["prompt"].tolist(), SamplingParams(max_tokens=len(golden["tokens"])))
        tokens = [token async for delta in mine for token in delta.token_ids]
        await asyncio.gather(*(other.text() for other in others))
    finally:
        await asyncio.to_thread(engine.shutdown, 0)
    assert tokens == golden["tokens"].tolist()
