"""The serving loop, and what it runs on the devices."""

from __future__ import annotations

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.replicas import load_engine

__all__ = ["Engine", "EngineConfig", "load_engine"]
