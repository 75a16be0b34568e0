"""Checks that both parity tests make of a folder with a ``golden.npz``."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from support.engines import together
from tokenizers import models

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.mixtures import operations
from astraea_jax.engine.page_counts import PageCounts
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.kernels import Batch, Reference
from astraea_jax.models.checkpoint import load_hf
from astraea_jax.models.sharding import default_mesh
from astraea_jax.models.tokenizer import Tokenizer
from astraea_jax.scheduler.wait import Wait

CONFIG = EngineConfig(max_seqs=8, max_step_tokens=24, page_size=8, kv_bytes=4 * 2**20, dtype="float32")
PAGES = 44
"""Less than eight running requests want."""
FIRST = 20
"""Tokens of the first of two requests."""


def check_logits(folder: Path) -> None:
    """Prefill logits through pages agree within 1e-4 of the largest, and every greedy token is the likeliest."""
    golden = np.load(folder / "golden.npz")
    decoder = load_hf(folder, jnp.float32, max_context=_max_context(golden))
    config, prompt = decoder.config, golden["prompt"]
    text = np.concatenate([prompt, golden.get("tokens", prompt[:0])])
    length, size = len(text), CONFIG.page_size
    table = jnp.arange(1, -(-length // size) + 1)[::-1][None]
    at = jnp.arange(length)
    slots = table[0, at // size] * size + at % size
    pages = (jnp.zeros((table.shape[1] + 1, 2, config.num_kv_heads, size, config.head_dim)),) * config.num_layers
    where = Batch(table, jnp.array([length]), jnp.array([0, length]), slots)

    def attend(_, heads, layer):
        return Reference().attend(heads, layer, where, q_tile=16)

    ops = operations(attend, Reference(), default_mesh())
    hidden, _ = jax.jit(lambda tokens: decoder(tokens, at, pages, ops))(text)
    logits = np.asarray(decoder.logits(hidden))
    error = np.abs(logits[: len(prompt)] - golden["logits"]).max() / np.abs(golden["logits"]).max()
    assert error < 1e-4, f"{folder.name}: relative error {error:.1e}"
    if len(text) > len(prompt):
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == golden["tokens"].tolist()


async def check_tokens(folder: Path, attention: str | None = None) -> None:
    """64 greedy tokens agree exactly: in two requests of a program, in a batch with other programs, prefilled in chunks
    between their steps, preempted, and with KV that went to the host and came back; by this attention, or the default.
    """
    golden = np.load(folder / "golden.npz")
    prompt, expected = golden["prompt"].tolist(), golden["tokens"].tolist()
    engine = _engine(folder, _max_context(golden), attention)
    engine.start()
    rng = random.Random(0)

    async def program(name: str, text: list[int], tokens: int) -> list[int]:
        said: list[int] = []
        for count in (FIRST, tokens - FIRST):
            params = SamplingParams(max_tokens=count, ignore_eos=True)
            deltas = engine.generate(text + said, params, session=name, final=bool(said))
            said += [token async for delta in deltas for token in delta.token_ids]
            if len(said) < tokens:
                engine.waits(name, Wait(("slow",)))
        return said

    try:
        others = [[rng.randrange(100) for _ in range(rng.randint(1, 60))] for _ in range(12)]
        work = [program(f"other {i}", text, 48) for i, text in enumerate(others)]
        work += [program(f"mine {i}", prompt, len(expected)) for i in range(2)]
        said = await together(engine, *work)
    finally:
        await asyncio.to_thread(engine.shutdown, 0)
    assert said[-2:] == [expected, expected]
    stats = engine.stats()
    assert stats.restored_pages > 0, "the pool was meant to be too small"
    all_slide = engine.layout.layers[0] == 0
    assert stats.preemptions > 0 or all_slide, "the pool was meant to be too small"  # else pages only count


def _engine(folder: Path, max_context: int | None, attention: str | None) -> Engine:
    """An engine with little room, and some on the host."""
    decoder = load_hf(folder, jnp.float32, max_context=max_context)
    model = decoder.config
    page = 2 * model.num_layers * model.num_kv_heads * CONFIG.page_size * model.head_dim * 4
    config = replace(
        CONFIG,
        residency="always-offload",
        max_context=max_context,
        host_kv_bytes=2 * PAGES * page,
        attention=attention,
    )
    room = PAGES * page
    if any(kind.window is None for kind in model.layer_kinds):  # windows leave room for more pages
        while PageCounts.within(room, page, model, config).full > PAGES:
            room -= page
    blank = Tokenizer(tokenizers.Tokenizer(models.BPE()), bos_id=None, eos_ids=frozenset(), template=None, special={})
    return Engine(decoder, blank, replace(config, kv_bytes=room))


def _max_context(golden: Mapping[str, np.ndarray]) -> int | None:
    return int(golden["max_context"]) or None if "max_context" in golden else None
