"""An MCP server with three tools of a shop. An agent may call them: see README.md, "Tools over MCP".

python examples/mcp_shop.py         speaks over standard input and output
python examples/mcp_shop.py 8800    serves http://127.0.0.1:8800/mcp
"""

from __future__ import annotations

import sys

from mcp.server import MCPServer
from shop import calculator, price, stock

server = MCPServer("shop", log_level="ERROR")
for function in (price, stock, calculator):
    server.add_tool(function)

if __name__ == "__main__":
    if sys.argv[1:]:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
