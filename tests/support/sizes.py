"""Sizes of the engine that most tests share, so that they share the engine too, or at least what is compiled."""

import dataclasses

from astraea_jax.engine.config import EngineConfig

PAGE_BYTES = 2048
SMALL = EngineConfig(max_seqs=8, max_step_tokens=32, page_size=4, kv_bytes=2 * 2**20, dtype="float32")
CHAT = dataclasses.replace(SMALL, max_context=512)
"""For astraea-tiny: a thousand tokens."""
NARROW = dataclasses.replace(SMALL, kv_bytes=48 * PAGE_BYTES, max_context=96)
"""Forty-seven pages of four tokens: less than eight running requests want."""
