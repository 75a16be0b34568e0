"""Sizes of the engine that most tests share, so that they share the engine too."""

from astraea_jax.config import EngineConfig

SMALL = EngineConfig(max_seqs=8, max_step_tokens=32, page_size=4, kv_bytes=2 * 2**20, dtype="float32")
