"""The server's own tools by flags, on a real server."""

from __future__ import annotations

import re
import sys
from typing import Any

import openai
import pytest
from support.scripts import ROOT

from astraea_jax.errors import StartupError
from astraea_jax.frontends.tool_flags import tools_in

QUESTION = "What is the total price of 3 lamps no. 47 and 2 chairs no. 82?"
CHAT: Any = [
    {"role": "system", "content": "You answer questions about the shop."},
    {"role": "user", "content": QUESTION},
]
SHOP = f"{sys.executable} {ROOT / 'examples' / 'mcp_shop.py'}"


def test_a_server_calls_the_tools_of_an_mcp_server(serve):
    with serve("--model=astraea-tiny", "--kv_bytes=4194304", f"--mcp={SHOP}") as server:
        [url] = re.findall(r"HTTP: (\S+),", server.said)
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            said = client.chat.completions.create(model="astraea-tiny", messages=CHAT, temperature=0)
    assert said.choices[0].message.content == "The total is 60."
    assert said.choices[0].message.tool_calls is None


def test_a_server_whose_tools_cannot_be_had_does_not_start(serve_fails):
    assert "cannot serve: MCP server 'no-such-command' cannot be used" in serve_fails("--mcp=no-such-command")
    assert "has no tools ['prize']" in serve_fails(f"--mcp={SHOP}", "--mcp_allow=prize")
    assert "cannot serve: --tools=no_such_module cannot be loaded" in serve_fails("--tools=no_such_module")
    assert "for clients of HTTP only" in serve_fails("--nohttp", f"--mcp={SHOP}")


def test_the_tools_of_a_file(tmp_path):
    file = tmp_path / "shop.py"
    file.write_text("from astraea_jax import tool\n\n@tool\ndef price(article: int) -> int:\n    return 10 + article\n")
    [price] = tools_in(str(file))
    assert price.name == "price"
    assert price(5) == 15


@pytest.mark.parametrize(
    ("code", "words"), [("x = 1", "no function with @tool"), ("1 / 0", "ZeroDivisionError"), ("(", "SyntaxError")]
)
def test_a_file_that_cannot_be_used_is_named(code, words, tmp_path):
    file = tmp_path / "shop.py"
    file.write_text(code)
    with pytest.raises(StartupError, match=words):
        tools_in(str(file))
