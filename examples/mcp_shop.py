"""An MCP server with three tools of a shop. An agent may call them: see README.md, "Tools over MCP".

python examples/mcp_shop.py         speaks over standard input and output
python examples/mcp_shop.py 8800    serves http://127.0.0.1:8800/mcp
"""

from __future__ import annotations

import sys

from mcp.server import MCPServer

PRICES, STOCKS = {47: 14, 82: 9}, {47: 120, 82: 8}

shop = MCPServer("shop", log_level="ERROR")


@shop.tool()
def price(article: int) -> int:
    """Price of one piece."""
    return PRICES[article]


@shop.tool()
def stock(article: int) -> int:
    """How many are in stock."""
    return STOCKS[article]


@shop.tool()
def calculator(expression: str) -> int:
    """Value of a sum."""
    return sum(int(a) * int(b) for a, b in (product.split("*") for product in expression.split("+")))


if __name__ == "__main__":
    if sys.argv[1:]:
        shop.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        shop.run("stdio")
