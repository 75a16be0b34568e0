"""MCP servers as tools: real servers of the ``mcp`` package, over standard input and output and over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import WAIT_S
from support.ports import free_port

from astraea_jax.agents import mcp
from astraea_jax.agents.mcp import McpServer, connected
from astraea_jax.agents.tool_types import ToolError
from astraea_jax.agents.tools import MAX_RESULT_CHARS, Tool, tool

SERVER = f"{sys.executable} {Path(__file__).parents[1] / 'support' / 'servers' / 'mcp_shop.py'}"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server over HTTP."""
    port = free_port()
    process = subprocess.Popen([*SERVER.split(), str(port)], stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["stdio", "http"])
def server(request) -> McpServer:
    return McpServer(SERVER if request.param == "stdio" else request.getfixturevalue("address"), timeout_s=WAIT_S)


def named(tools: tuple[Tool, ...]) -> dict[str, Tool]:
    return {tool.name: tool for tool in tools}


async def test_its_tools_are_called_like_others(server):
    @tool
    def own(word: str) -> str:
        """A tool of the agent's own."""
        return word

    async with connected([own, server]) as tools:
        by_name = named(tools)
        assert list(by_name)[:3] == ["own", "price", "shop_stock"]  # a dot is no part of a tool's name here
        assert by_name["price"].description == "Price of one piece."
        assert by_name["price"].schema()["function"]["parameters"]["properties"]["article"]["type"] == "integer"
        assert await by_name["price"].call({"article": 5}) == "15"
        assert json.loads(await by_name["shop_stock"].call({"article": 5})) == {"article": 5, "pieces": 3}
        assert await by_name["own"].call({"word": "so"}) == "so"
        assert await asyncio.gather(*(by_name["price"].call({"article": n}) for n in range(20))) == [
            str(10 + n) for n in range(20)
        ]


async def test_what_goes_wrong_in_a_call_is_its_result(server):
    async with connected([server]) as tools:
        by_name = named(tools)
        for name, arguments, words in (
            ("fails", {"word": "cake"}, "fails"),
            ("price", {}, "article"),
            ("price", {"article": "many"}, "integer"),
            ("price", {"article": {"deep": [None]}}, "integer"),
            ("refuses", {}, "not today"),
        ):
            assert words in json.loads(await by_name[name].call(arguments))["error"]
        assert await by_name["price"].call({"article": 5}) == "15"


async def test_results_are_bounded(server):
    async with connected([server]) as tools:
        text = await named(tools)["long"].call({})
    assert len(text) < MAX_RESULT_CHARS + 60
    assert "cut: 100000 characters" in text


async def test_a_call_has_a_time_limit_and_others_go_on():
    async with connected([McpServer(SERVER, timeout_s=WAIT_S)]) as tools:
        by_name = named(tools)
        slow = asyncio.create_task(by_name["sleeps"].call({}))
        assert await by_name["price"].call({"article": 5}) == "15"
        slow.cancel()
    async with connected([McpServer(SERVER, timeout_s=WAIT_S, allow=["sleeps"])]) as [sleeps]:
        object.__setattr__(sleeps, "timeout_s", 0.05)
        assert "did not answer within 0.05 s" in await sleeps.call({})


async def test_a_server_that_dies_fails_its_call_and_is_connected_again():
    async with connected([McpServer(SERVER, timeout_s=WAIT_S)]) as tools:
        by_name = named(tools)
        assert "has gone" in await by_name["dies"].call({})
        assert await by_name["price"].call({"article": 5}) == "15"


async def test_only_allowed_tools_are_taken():
    async with connected([McpServer(SERVER, allow=["price"], timeout_s=WAIT_S)]) as tools:
        assert list(named(tools)) == ["price"]
    with pytest.raises(ToolError, match=r"no tools \['prize'\]; it has \['price'"):
        async with connected([McpServer(SERVER, allow=["prize"], timeout_s=WAIT_S)]):
            pass


async def test_descriptions_are_bounded(monkeypatch):
    monkeypatch.setattr(mcp, "MAX_TOOLS", 3)
    with pytest.raises(ToolError, match="more than 3 tools"):
        async with connected([McpServer(SERVER, timeout_s=WAIT_S)]):
            pass
    monkeypatch.setattr(mcp, "MAX_SCHEMA_CHARS", 20)
    with pytest.raises(ToolError, match="schema of 'price'"):
        async with connected([McpServer(SERVER, allow=["price"], timeout_s=WAIT_S)]):
            pass


async def test_a_command_sees_nothing_of_the_environment_but_what_it_is_given(monkeypatch):
    monkeypatch.setenv("ASTRAEA_SECRET", "secret")
    server = McpServer(SERVER, allow=["environment"], env={"GIVEN": "yes"}, timeout_s=WAIT_S)
    async with connected([server]) as [environment]:
        assert await environment.call({"name": "ASTRAEA_SECRET"}) == "unset"
        assert await environment.call({"name": "GIVEN"}) == "yes"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("no-such-command-anywhere", "cannot be used: FileNotFoundError"),
        (f"{sys.executable} -c pass", "cannot be used"),
        (f"{sys.executable} -c 'import time; time.sleep(60)'", "did not answer within 0.5 s"),
        ("http://127.0.0.1:9/mcp", "cannot be used"),
    ],
)
async def test_a_server_that_cannot_be_used_is_named(address, words):
    with pytest.raises(ToolError, match="MCP server") as caught:
        async with connected([McpServer(address, timeout_s=0.5 if "sleep" in address else WAIT_S)]):
            pass
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"address": ""}, "empty"),
        ({"address": None}, "http address or by a command line"),
        ({"address": "x", "allow": "price"}, "list of names"),
        ({"address": "x", "timeout_s": 0}, "positive seconds"),
        ({"address": "x", "timeout_s": "1"}, "positive seconds"),
    ],
)
def test_values_that_cannot_be_used_are_named(arguments, words):
    with pytest.raises(ToolError, match=words):
        McpServer(**arguments)
