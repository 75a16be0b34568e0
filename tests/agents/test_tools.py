"""Functions become tools, and nothing that a tool or a model does in a call gets out of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import threading
from enum import Enum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engines import WAIT_S

from astraea_jax.agents import tools
from astraea_jax.agents.tool_types import ToolError, kind_of
from astraea_jax.agents.tools import Tool, tool


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@tool
def paint(
    item: str,
    colour: Colour,
    coats: int = 1,
    shades: list[float] | None = None,
    finish: Literal["matt", "gloss"] = "matt",
) -> dict[str, Any]:
    """Paint an item
    of the shop.

    Args:
        item: its name, such as
            "lamp"
        colour (Colour): new colour
        coats: how many

    Returns:
        what was: painted
    """
    return {"item": item, "colour": colour.name, "coats": coats, "shades": shades, "finish": finish}


PAINT = {"item": "lamp", "colour": "red"}


def test_schema() -> None:
    assert paint.schema() == {
        "type": "function",
        "function": {
            "name": "paint",
            "description": "Paint an item of the shop.",
            "parameters": {
                "type": "object",
                "properties": {
                    "item": {"type": "string", "description": 'its name, such as "lamp"'},
                    "colour": {"type": "string", "enum": ["red", "blue"], "description": "new colour"},
                    "coats": {"type": "integer", "description": "how many"},
                    "shades": {"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "null"}]},
                    "finish": {"type": "string", "enum": ["matt", "gloss"]},
                },
                "required": ["item", "colour"],
            },
        },
    }


async def test_call_converts_arguments_and_encodes_the_result() -> None:
    result = await paint.call({**PAINT, "coats": 2.0, "shades": [1, 0.5]})
    assert json.loads(result) == {
        "item": "lamp",
        "colour": "RED",
        "coats": 2,
        "shades": [1.0, 0.5],
        "finish": "matt",
    }


def test_a_tool_is_still_a_function() -> None:
    assert paint("lamp", Colour.BLUE)["colour"] == "BLUE"


async def test_wrapping_keeps_the_schema_and_the_checks() -> None:
    async def shout(**arguments: Any) -> str:
        return str(paint(**arguments)["item"]).upper()

    loud = paint.wrapped(shout)
    assert loud.schema() == paint.schema()
    assert await loud.call(PAINT) == "LAMP"
    assert "missing" in await loud.call({})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"item": "lamp"}, "missing 'colour'"),
        ({**PAINT, "size": 3}, "unknown 'size'; paint takes 'item', 'colour', 'coats', 'shades', 'finish'"),
        ({**PAINT, "item": 3}, "item: expected a string, got 3"),
        ({**PAINT, "coats": True}, "coats: expected an integer, got true"),
        ({**PAINT, "coats": 1.5}, "coats: expected an integer, got 1.5"),
        ({**PAINT, "colour": "pink"}, 'colour: expected one of "red", "blue", got "pink"'),
        ({**PAINT, "shades": [1, "x"]}, 'shades: item 1: expected a number, got "x"; or expected null'),
        ({**PAINT, "shades": [float("nan")]}, "finite number"),
        ({**PAINT, "finish": ["matt"]}, 'expected one of "matt", "gloss"'),
        ({**PAINT, "item": {"x" * 100: 1}}, "…"),
        ([1, 2], "expected an object"),
        (None, "expected an object"),
    ],
)
async def test_bad_arguments_are_a_result(arguments: Any, message: str) -> None:
    error = json.loads(await paint.call(arguments))["error"]
    assert error.startswith("bad arguments: ")
    assert message in error


JSON = st.recursive(  # integers that a float can hold, for an int is a fine float
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(arguments=st.dictionaries(st.sampled_from(["item", "colour", "coats", "shades", "x"]), JSON) | JSON)
def test_no_arguments_whatever_break_a_call(arguments: Any) -> None:
    result = json.loads(asyncio.run(paint.call(arguments)))
    assert ("error" in result) != ("item" in result)


TYPES = st.recursive(
    st.sampled_from([str, int, float, bool, list[None], Colour, Literal["a", 1, True], list, dict]),
    lambda inner: inner.map(lambda t: list[t]) | inner.map(lambda t: dict[str, t]) | inner.map(lambda t: t | None),
    max_leaves=3,
)


@given(annotation=TYPES, value=JSON)
def test_a_value_is_refused_or_keeps_its_meaning(annotation: Any, value: Any) -> None:
    kind = kind_of(annotation, "here")
    json.dumps(kind.schema)
    with contextlib.suppress(ValueError):
        assert json.loads(json.dumps(kind.read(value), default=lambda member: member.value)) == value


def _star(*args: int) -> None: ...
def _bare(x) -> None: ...
def _bytes(x: bytes) -> None: ...
def _tuple(x: tuple[int, str]) -> None: ...
def _keyed(x: dict[int, str]) -> None: ...
def _unknown(x: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def _empty(x: Literal[b"raw"]) -> None: ...
def _described(x: int) -> None:
    """Do.

    Args:
        y: no such thing
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_star, "parameter args: a model passes arguments by name"),
        (_bare, "parameter x: annotate its type"),
        (_bytes, "bytes'> is not supported; use str, int"),
        (_tuple, "is not supported"),
        (_keyed, "is not supported"),
        (_unknown, "name 'Nowhere' is not defined"),
        (_empty, "choices must be strings, numbers"),
        (_described, "describes 'y', not in the signature"),
        (lambda: None, "'<lambda>' is no name for a tool"),
    ],
)
def test_what_cannot_be_described_is_refused_at_once(function: Any, message: str) -> None:
    with pytest.raises(ToolError) as caught:
        tool(function)
    assert message in str(caught.value)


@pytest.mark.parametrize("seconds", [0, -1.5, float("nan"), True, "5", None])
def test_a_timeout_must_be_positive(seconds: Any) -> None:
    with pytest.raises(ToolError, match="timeout_s must be positive"):
        tool(timeout_s=seconds)(paint.function)


async def test_a_timeout_may_be_endless() -> None:
    assert json.loads(await tool(timeout_s=math.inf)(paint.function).call(PAINT))["item"] == "lamp"


@pytest.mark.parametrize("function", [dict, max])
def test_functions_without_a_signature_are_refused(function: Any) -> None:
    with pytest.raises(ToolError, match="signature"):
        tool(function)


async def test_numbers_are_not_rounded_where_integers_are_allowed() -> None:
    @tool
    def same(x: float | int | str, deep: list[dict[str, float | int | None]]) -> Any:
        return [x, deep]

    assert json.loads(await same.call({"x": 2**60 + 1, "deep": [{"a": 2**60 + 1, "b": 0.5, "c": None}]})) == [
        2**60 + 1,
        [{"a": 2**60 + 1, "b": 0.5, "c": None}],
    ]
    error = json.loads(await same.call({"x": 1, "deep": [{"a": "b"}]}))["error"]
    assert 'deep: item 0: key "a": expected an integer, got "b"' in error


def failing(error: BaseException, *, sync: bool) -> Tool:
    if sync:

        @tool
        def fail() -> None:
            raise error

        return fail

    @tool(name="fail")
    async def afail() -> None:
        raise error

    return afail


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


class Unusual(BaseException):
    pass


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("lamp"), "KeyError: 'lamp'"),
        (SystemExit(3), "SystemExit: 3"),
        (StopIteration(), "StopIteration"),
        (GeneratorExit(), "GeneratorExit"),
        (Unusual("no exception"), "Unusual: no exception"),
        (Unprintable(), "Unprintable"),
        (ValueError("x" * 9000), f"ValueError: {'x' * 988}… [cut: 9012 characters in all]"),
    ],
)
async def test_exceptions_are_a_result(error: BaseException, message: str, sync: bool) -> None:
    # a StopIteration out of a coroutine arrives as the RuntimeError that Python makes of it
    result = json.loads(await failing(error, sync=sync).call({}))["error"]
    assert message in result


@pytest.mark.parametrize("sync", [True, False])
async def test_an_interrupt_that_a_tool_raises_by_itself_is_a_result(sync: bool) -> None:
    def in_another_thread() -> str:
        return asyncio.run(failing(KeyboardInterrupt(), sync=sync).call({}))

    assert json.loads(await asyncio.to_thread(in_another_thread))["error"] == "KeyboardInterrupt"


async def test_a_tool_that_cancels_itself() -> None:
    result = await failing(asyncio.CancelledError(), sync=False).call({})
    assert json.loads(result) == {"error": "fail was cancelled"}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({1, 2}, "returned a set that is not JSON"),
        (object(), "returned a object that is not JSON"),
    ],
)
async def test_results_that_are_not_json(returned: object, message: str) -> None:
    @tool
    def give() -> object:
        return returned

    assert message in json.loads(await give.call({}))["error"]


async def test_results_are_bounded_and_can_be_encoded() -> None:
    @tool
    def give() -> str:
        return "\ud800" + "é" * 100_000

    result = await give.call({})
    assert result.startswith("?é")
    assert result.endswith("é… [cut: 100001 characters in all]")
    assert len(result.encode()) < 3 * tools.MAX_RESULT_CHARS


async def test_a_hanging_async_tool_is_cancelled() -> None:
    cancelled = asyncio.Event()

    @tool(timeout_s=0.05)
    async def hang() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    assert json.loads(await hang.call({})) == {"error": "hang did not answer within 0.05 s"}
    await asyncio.wait_for(cancelled.wait(), 60)


@pytest.mark.parametrize("seconds", [0, 3600])
async def test_an_async_function_behind_a_decorator(seconds: float) -> None:
    async def nap(item: str) -> str:
        await asyncio.sleep(seconds)
        return item

    @tool(timeout_s=WAIT_S if seconds == 0 else 0.05)
    @functools.wraps(nap)
    def traced(**arguments: Any) -> Any:
        return nap(**arguments)

    assert await traced.call({"item": "lamp"}) == (
        "lamp" if seconds == 0 else '{"error": "nap did not answer within 0.05 s"}'
    )


async def test_a_hanging_sync_tool_blocks_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "MAX_THREADS", 2)
    release = threading.Event()

    @tool(timeout_s=0.1)
    def hang() -> str:
        release.wait(WAIT_S)
        return "late"

    @tool(timeout_s=WAIT_S)
    def work() -> str:
        return "done"

    hung = [asyncio.create_task(hang.call({})) for _ in range(6)]
    assert await asyncio.gather(*(work.call({}) for _ in range(6))) == ["done"] * 6
    assert all("did not answer" in text for text in await asyncio.gather(*hung))
    assert sum(thread.name == "tool-hang" for thread in threading.enumerate()) == 2
    release.set()  # its threads are free again
    object.__setattr__(hang, "timeout_s", WAIT_S)
    assert await hang.call({}) == "late"


async def test_calls_of_a_sync_tool_run_at_the_same_time() -> None:
    together = threading.Barrier(8)

    @tool(timeout_s=WAIT_S)
    def meet() -> str:
        together.wait(WAIT_S)
        return "met"

    assert await asyncio.gather(*(meet.call({}) for _ in range(8))) == ["met"] * 8


@pytest.mark.parametrize("sync", [True, False])
async def test_cancelling_a_call(sync: bool) -> None:
    began, release, ended = threading.Event(), threading.Event(), threading.Event()

    @tool(name="slow")
    def slow() -> None:
        began.set()
        release.wait(WAIT_S)
        ended.set()

    @tool(name="slow")
    async def aslow() -> None:
        began.set()
        await asyncio.sleep(3600)
        ended.set()

    call = asyncio.create_task((slow if sync else aslow).call({}))
    await asyncio.to_thread(began.wait, WAIT_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not ended.is_set()
    release.set()


def test_one_tool_serves_several_event_loops() -> None:
    @tool
    def double(x: int) -> int:
        return 2 * x

    assert [asyncio.run(double.call({"x": x})) for x in range(3)] == ["0", "2", "4"]
