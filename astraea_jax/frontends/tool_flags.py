"""The server's own tools as command-line flags: MCP servers, and Python files with ``@tool`` functions."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from absl import flags

from astraea_jax.agents.mcp import McpServer
from astraea_jax.agents.tools import Tool
from astraea_jax.errors import StartupError


def tool_flags() -> Callable[[], list[Tool | McpServer]]:
    """Define the flags; return a function that makes tools of their values."""
    flags.DEFINE_multi_string(
        "mcp", [], "An MCP server whose tools the server calls itself: its http address, or a command line. Several."
    )
    flags.DEFINE_list("mcp_allow", None, "Names of the tools that are taken of each --mcp; by default all.")
    flags.DEFINE_float("mcp_timeout_s", 60.0, "Seconds that a call of an MCP server's tool may take.", 0.001)
    flags.DEFINE_multi_string(
        "tools", [], "A Python file, or a module, whose @tool functions the server calls itself. Several."
    )
    for name in ("mcp", "mcp_allow", "mcp_timeout_s", "tools"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def tools() -> list[Tool | McpServer]:
        chosen = flags.FLAGS
        servers = [McpServer(address, chosen.mcp_allow, chosen.mcp_timeout_s) for address in chosen.mcp]
        return [*servers, *(tool for name in chosen.tools for tool in tools_in(name))]

    return tools


def tools_in(name: str) -> list[Tool]:
    """Return the tools that a Python file or module defines. It is run: what it does is the operator's affair.

    Raises:
        StartupError: it cannot be loaded, or has no tools.
    """
    try:
        module = _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except Exception as error:
        raise StartupError(f"--tools={name} cannot be loaded: {type(error).__name__}: {error}") from error
    found = [value for value in vars(module).values() if isinstance(value, Tool)]
    if not found:
        raise StartupError(f"--tools={name} has no function with @tool")
    return found


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError("it is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
