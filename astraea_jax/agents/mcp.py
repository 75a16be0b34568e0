"""Tools of MCP servers (Model Context Protocol), as tools that an agent may call.

The protocol is the ``mcp`` package's, an optional dependency. A server is not trusted: which of its tools are taken,
how many, how large their descriptions are, how long a call takes and how long its result is are all bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from astraea_jax.agents.tool_types import ToolError
from astraea_jax.agents.tools import Tool

MAX_TOOLS = 128
"""Tools of one server; an agent that needs more takes some of them by ``allow``."""
MAX_DESCRIPTION_CHARS = 4_096
MAX_SCHEMA_CHARS = 65_536
MAX_PAGES = 64
"""Pages of a server's list of tools."""
CLOSE_S = 5.0
"""Seconds that a server gets to say goodbye."""


@dataclass(frozen=True, eq=False)
class McpServer:
    """An MCP server whose tools agents may call.

    Args:
        address: ``http://…`` or ``https://…`` of a server that runs (Streamable HTTP), or a command line that starts
            one which speaks over its standard input and output. The command gets a few harmless variables of the
            environment, and those of ``env``.
        allow: names of the tools that are taken; None: all.
        timeout_s: seconds that the connection, and each call, may take.
        env: variables for the command.

    Raises:
        ToolError: a value cannot be used.
    """

    address: str
    allow: Collection[str] | None = None
    timeout_s: float = 60.0
    env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.address, str) or not self.address.strip():
            raise ToolError("an MCP server is given by its http address or by a command line, which must not be empty")
        if isinstance(self.allow, str):
            raise ToolError(f"allow must be a list of names of tools, not the text {self.allow[:60]!r}")
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, int | float) or not self.timeout_s > 0:
            raise ToolError(f"timeout_s must be positive seconds, not {self.timeout_s!r}")

    @property
    def over_http(self) -> bool:
        """Whether it runs already, and is reached over HTTP."""
        return self.address.startswith(("http://", "https://"))

    def __str__(self) -> str:
        return f"MCP server {self.address[:80]!r}"


@contextlib.asynccontextmanager
async def connected(tools: Sequence[Tool | McpServer]) -> AsyncIterator[tuple[Tool, ...]]:
    """Connect the servers among ``tools`` while the context is open; yields all tools, in order.

    Raises:
        ToolError: a server cannot be reached, or lists what cannot be used; or the ``mcp`` package is missing.
    """
    links = {server: _Link(server) for server in tools if isinstance(server, McpServer)}
    try:
        listed = dict(zip(links, await asyncio.gather(*(link.open() for link in links.values())), strict=True))
        yield tuple(tool for given in tools for tool in (listed[given] if isinstance(given, McpServer) else [given]))
    finally:
        await asyncio.gather(*(link.close() for link in links.values()))


class _Link:
    """A connection to one server, held by a task of its own: what fails there ends the connection and nothing else."""

    def __init__(self, server: McpServer):
        self._server = server
        self._client: Any = None
        self._closing = asyncio.Event()
        self._opening = asyncio.Lock()
        self._holder: asyncio.Task[None] | None = None

    async def open(self) -> list[Tool]:
        """Connect, and return the server's tools."""
        listed: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._holder = asyncio.create_task(self._hold(_client(self._server), listed), name=str(self._server))
        either: set[asyncio.Future[Any]] = {self._holder, listed}
        await asyncio.wait(either, timeout=self._server.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if listed.done():
            return self._taken(listed.result())
        if not self._holder.done():
            raise ToolError(f"{self._server} did not answer within {self._server.timeout_s:g} s")
        raise ToolError(f"{self._server} cannot be used: {_cause(self._holder.exception())}")

    async def close(self) -> None:
        """End the connection, and with it a server that was started here."""
        self._closing.set()
        if self._holder is None:
            return
        if self._client is not None:
            await asyncio.wait({self._holder}, timeout=CLOSE_S)
        self._holder.cancel()
        await asyncio.wait({self._holder}, timeout=CLOSE_S)
        if self._holder.done() and not self._holder.cancelled():
            self._holder.exception()  # whoever waited was told

    async def _hold(self, client: Any, listed: asyncio.Future[list[Any]]) -> None:
        tools: list[Any] = []
        async with client:
            cursor = None
            for _ in range(MAX_PAGES):
                page = await client.list_tools(cursor=cursor)
                tools += page.tools
                cursor = page.next_cursor
                if cursor is None or len(tools) > MAX_TOOLS:
                    break
            self._client = client
            listed.set_result(tools)
            await self._closing.wait()

    def _taken(self, listed: list[Any]) -> list[Tool]:
        """Return the tools that are allowed."""
        server, allow = self._server, self._server.allow
        names = [tool.name for tool in listed]
        if allow is not None and (unknown := [name for name in allow if name not in names]):
            raise ToolError(f"{server} has no tools {unknown}; it has {names[:MAX_TOOLS]}")
        taken = [tool for tool in listed if allow is None or tool.name in allow]
        if len(taken) > MAX_TOOLS:
            raise ToolError(f"{server} has more than {MAX_TOOLS} tools; name those that agents may call in allow")
        return [self._tool(tool) for tool in taken]

    def _tool(self, listed: Any) -> Tool:
        schema = listed.input_schema
        if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
            raise ToolError(
                f"{self._server}: the schema of {listed.name[:64]!r} has over {MAX_SCHEMA_CHARS} characters"
            )

        async def call(**arguments: Any) -> str:
            return await self._call(listed.name, arguments)

        name = re.sub(r"[^A-Za-z0-9_-]", "_", listed.name)[:64]  # names that models' formats and other APIs can write
        description = (listed.description or "")[:MAX_DESCRIPTION_CHARS]
        return Tool(name, description, schema, call, self._server.timeout_s, kinds=None)

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a tool. A server that has gone is connected anew, once for each call."""
        async with self._opening:
            if self._holder is None or self._holder.done():
                await self.open()
        assert self._holder is not None
        call = asyncio.ensure_future(self._client.call_tool(name, arguments))
        try:
            await asyncio.wait({call, self._holder}, return_when=asyncio.FIRST_COMPLETED)
            if call.done() and not _is_closed(call.exception()):
                return _text(call.result())
            self._holder.cancel()  # what is left of the connection
            await asyncio.wait({self._holder}, timeout=CLOSE_S)
            raise ConnectionError(f"{self._server} has gone; the next call connects it again")
        finally:
            call.cancel()


def _is_closed(error: BaseException | None) -> bool:
    from mcp import MCPError
    from mcp_types import CONNECTION_CLOSED

    return isinstance(error, MCPError) and error.code == CONNECTION_CLOSED


def _client(server: McpServer) -> Any:
    try:
        from mcp import Client, StdioServerParameters
    except ImportError:
        raise ToolError("MCP servers need the mcp package: pip install 'astraea-jax[mcp]'") from None
    if server.over_http:
        return Client(server.address, cache=None)
    command, *arguments = shlex.split(server.address)
    return Client(StdioServerParameters(command=command, args=arguments, env=dict(server.env)), cache=None)


def _text(result: Any) -> str:
    """Return what a model reads of a result: texts as they are, or else the structured content as JSON.

    Raises:
        RuntimeError: the tool says that it has failed.
    """
    texts = [block.text if block.type == "text" else f"[{block.type}, which is not text]" for block in result.content]
    if not texts and result.structured_content is not None:
        texts = [json.dumps(result.structured_content, ensure_ascii=False)]
    if result.is_error:
        raise RuntimeError("\n".join(texts) or "the tool failed")
    return "\n".join(texts)


def _cause(error: BaseException | None) -> str:
    """Return the first error within groups of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if error is not None else "it ended at once"
