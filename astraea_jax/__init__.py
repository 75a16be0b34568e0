"""astraea_jax: a JAX serving engine that schedules whole LLM-agent programs."""

from __future__ import annotations

from astraea_jax.agents.mcp import McpServer
from astraea_jax.agents.tool_types import ToolError
from astraea_jax.agents.tools import Tool, tool
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.generation import Delta, Generation, Usage
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import EngineDead, Overloaded, RequestError, StartupError
from astraea_jax.frontends.llm import LLM, Completion
from astraea_jax.models.config import CheckpointError
from astraea_jax.scheduler.wait import Wait

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CheckpointError",
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "Generation",
    "McpServer",
    "Overloaded",
    "RequestError",
    "SamplingParams",
    "StartupError",
    "Tool",
    "ToolError",
    "Usage",
    "Wait",
    "tool",
]
