"""An MCP server for the tests: ``python mcp_shop.py`` speaks over stdio, ``python mcp_shop.py PORT`` over HTTP."""

from __future__ import annotations

import os
import sys
import time

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("shop", log_level="ERROR")


@server.tool()
def price(article: int) -> int:
    """Price of one piece."""
    return 10 + article


@server.tool(name="shop.stock")
def stock(article: int) -> dict[str, int]:
    """How many are in stock."""
    return {"article": article, "pieces": 3}


@server.tool()
def fails(word: str) -> str:
    """Always fails."""
    raise ValueError(f"no {word} today")


@server.tool()
def refuses() -> str:
    """Always refuses."""
    raise ToolError("not today")


@server.tool()
def sleeps() -> str:
    """Takes too long."""
    time.sleep(60)
    return "awake"


@server.tool()
def dies() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool()
def environment(name: str) -> str:
    """A variable of the environment."""
    return os.environ.get(name, "unset")


@server.tool()
def long() -> str:
    """A very long text."""
    return "x" * 100_000


if __name__ == "__main__":
    if sys.argv[1:]:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
