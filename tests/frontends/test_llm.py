"""The synchronous front door on real models: a random one, and the bundled one where tools are to be called."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from support.engines import WAIT_S, held
from support.scripts import ROOT
from support.sizes import CHAT, SMALL

from astraea_jax import (
    LLM,
    EngineDead,
    McpServer,
    RequestError,
    SamplingParams,
    StartupError,
    ToolError,
    tool,
)
from astraea_jax.agents import tools
from astraea_jax.engine.engine import Engine
from astraea_jax.frontends.llm import _conversations

EIGHT = SamplingParams(max_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
HI = {"role": "user", "content": "hi"}
SHOP = [
    {"role": "system", "content": "You answer questions about the shop."},
    {"role": "user", "content": "How much do 5 clocks no. 31 cost?"},
]

TOTAL = "What is the total price of 3 lamps no. 47 and 2 chairs no. 82?"


@pytest.fixture(scope="module")
def llm(random_folder) -> Iterator[LLM]:
    with LLM(random_folder, SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def shop() -> Iterator[LLM]:
    """The bundled model, which calls tools."""
    with LLM("astraea-tiny", CHAT) as llm:
        yield llm


def until(happened: Callable[[], object]) -> None:
    while not happened():
        time.sleep(0.005)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """``work`` in a thread of its own, and where its result or error will be."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def test_generate_and_chat(llm, greedy):
    encode = llm.engine.tokenizer.encode
    completions = llm.generate(["hello", "x" * 30, "you"], EIGHT)
    assert [list(c.token_ids) for c in completions] == [greedy(encode(p), 8) for p in ("hello", "x" * 30, "you")]
    assert completions[0].text == llm.engine.tokenizer.decode(completions[0].token_ids)
    [alone] = llm.generate("hello", EIGHT)
    assert alone.token_ids == completions[0].token_ids
    [one] = llm.chat([HI], params=EIGHT)
    two = llm.chat([[HI], [HI]], params=EIGHT)
    assert {one.text} == {program.text for program in two}
    assert llm.generate([]) == llm.chat([]) == []
    until(lambda: llm.engine.stats().programs == 0)


def test_one_bad_entry_of_a_batch_costs_no_other(llm, greedy):
    first, bad, last = llm.generate(["hello", "y" * 300, "you"], EIGHT)
    assert list(first.token_ids) == greedy(llm.engine.tokenizer.encode("hello"), 8)
    assert last.error is None
    assert (bad.text, bad.token_ids, bad.finish_reason, bad.usage) == ("", (), "error", None)
    assert isinstance(bad.error, RequestError)
    wrong = [HI, {"role": "user", "content": [{"type": "image_url"}]}]
    good, long, odd = llm.chat([[HI], [{"role": "user", "content": "y" * 300}], wrong], params=EIGHT)
    assert (good.finish_reason, good.error) == ("length", None)
    assert isinstance(long.error, RequestError)
    assert long.messages == [{"role": "user", "content": "y" * 300}]
    assert "image_url" in str(odd.error)


def test_a_single_entry_raises_its_error(llm):
    with pytest.raises(RequestError, match="context"):
        llm.generate("y" * 300)
    with pytest.raises(RequestError, match="context"):
        llm.chat([{"role": "user", "content": "y" * 300}])
    assert llm.generate("hello", EIGHT)[0].error is None


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate([[1, 2]]),
        lambda llm: llm.generate("a", {"max_tokens": 3}),
        lambda llm: llm.chat("hi"),
        lambda llm: llm.chat(HI),
        lambda llm: llm.chat(["hi"]),
        lambda llm: llm.chat([HI], params=7),
        lambda llm: llm.chat([HI], [len]),
        lambda llm: llm.chat([HI], max_steps=2.5),
        lambda llm: llm.chat([HI, [HI]]),
        lambda llm: llm.chat([[HI], HI]),
        lambda llm: llm.chat([(HI,), HI, SimpleNamespace(role="user", content="hi")]),
    ],
)
def test_wrong_types_are_refused_before_anything_runs(llm, call):
    created = llm.engine.stats().created
    with pytest.raises(TypeError):
        call(llm)
    assert llm.engine.stats().created == created


def test_messages_may_be_objects(llm):
    class Message:
        def model_dump(self, **_: object) -> dict[str, object]:
            return dict(HI)

    spoken = {llm.chat([one], params=EIGHT)[0].text for one in (HI, Message(), SimpleNamespace(**HI))}
    assert len(spoken) == 1
    assert [len(one) for one in _conversations([HI, Message(), HI])] == [3]
    assert [len(one) for one in _conversations([[HI, Message()], (HI,)])] == [2, 1]


def test_template_arguments_reach_the_template(shop):
    [plain] = shop.chat(SHOP, params=EIGHT)
    [with_unused] = shop.chat(SHOP, params=EIGHT, template_arguments={"enable_thinking": False})
    assert plain.text == with_unused.text
    with pytest.raises(TypeError):
        shop.chat(SHOP, params=EIGHT, template_arguments={"enable_thinking": object()})


def test_chats_go_on_from_their_own_tokens(shop):
    """Within an agent, and in a later chat that continues what was said."""

    @tool
    def price(article: int) -> int:
        """Price of one piece."""
        return 65

    page_size = shop.engine.config.page_size
    [agent] = shop.chat(SHOP, [price], max_steps=3, params=SamplingParams(max_tokens=64, temperature=1.5, seed=3))
    more = [*agent.messages, {"role": "user", "content": "And 6 of them?"}]
    [later] = shop.chat(more, [price], max_steps=1, params=EIGHT)
    requests = [*agent.requests, later.requests[0]]
    assert len(requests) > 1
    for before, after in itertools.pairwise(requests):
        known = before.usage.prompt_tokens + before.output_tokens - 1  # nothing was computed of the last token yet
        assert after.usage.cached_tokens >= known - known % page_size


def test_the_call_format_can_be_named(shop):
    @tool
    def price(item: str, number: int) -> int:
        """Price of an item."""
        return 14

    [read] = shop.chat(SHOP, [price], max_steps=2, call_format="hermes")
    [unread] = shop.chat(SHOP, [price], max_steps=2, call_format="gemma")
    assert len(read.requests) == 2
    assert len(unread.requests) == 1
    assert "<tool_call>" in unread.text
    with pytest.raises(ValueError, match="no call format 'nous'"):
        shop.chat(SHOP, [price], call_format="nous")


def test_more_prompts_than_the_queue_holds(random_folder, greedy):
    """Another user of the engine fills its queue meanwhile."""
    prompts = [f"number {i}" for i in range(40)]
    with LLM(random_folder, dataclasses.replace(SMALL, max_queued=9, max_programs=12)) as llm:

        async def others() -> None:
            await asyncio.gather(*[llm.engine.generate([1], LONG).text() for _ in range(9)])

        with held(llm.engine, 0):
            thread, _ = in_thread(lambda: asyncio.run(others()))
            until(lambda: llm.engine.in_progress == 9)
        completions = llm.generate(prompts, EIGHT)
        programs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params=EIGHT)
        thread.join()
        encode = llm.engine.tokenizer.encode
    assert [list(c.token_ids) for c in completions] == [greedy(encode(prompt), 8) for prompt in prompts]
    assert [program.error for program in programs] == [None] * 40


@pytest.mark.parametrize("batch", [1, 3])
def test_ctrl_c_ends_what_the_call_has_begun(shop, batch):
    calls, numbers, let_go = [], itertools.count(1), threading.Event()

    @tool(name="calculator")
    def interrupted(expression: str) -> int:
        """Value of a sum."""
        calls.append(expression)
        if next(numbers) == batch:  # of one thread only, however they take turns
            os.kill(os.getpid(), signal.SIGINT)
        let_go.wait(60)
        return 325

    @tool
    def price(article: int) -> int:
        """Price of one piece."""
        return 65

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            shop.chat([SHOP] * batch, [price, interrupted])
    finally:
        signal.signal(signal.SIGINT, before)
    let_go.set()
    made = len(calls)
    until(lambda: shop.engine.in_progress == 0)
    assert len(calls) == made
    until(lambda: shop.engine.stats().programs == 0)
    assert shop.generate("hi", EIGHT)[0].error is None


def test_close_ends_calls_of_other_threads(random_folder):
    llm = LLM(random_folder, SMALL)
    with held(llm.engine, 2):
        calls = [in_thread(lambda: llm.generate(["a"] * 20, LONG)), in_thread(lambda: llm.chat([HI], params=LONG))]
        until(lambda: llm.engine.in_progress >= 9)
        closing = [in_thread(llm.close) for _ in range(3)]
        until(lambda: not llm.engine.live)
    for thread, _ in closing + calls:
        thread.join(60)
    assert [outcome for _, outcome in closing] == [[None]] * 3
    for _, [outcome] in calls:
        assert isinstance(outcome, EngineDead)
    llm.close()
    assert llm.engine.in_progress == 0
    for call in (lambda: llm.generate("a"), lambda: llm.chat([HI]), llm.__enter__):
        with pytest.raises(EngineDead, match="closed"):
            call()


def test_a_plain_tool_may_close_it(random_folder, shop):
    """Whoever waits for the agents then gets an error; the tool itself is not held up."""
    other = LLM(random_folder, SMALL)

    @tool(name="calculator")
    def closing(expression: str) -> str:
        """Value of a sum."""
        other.close()
        return "closed"

    @tool
    def price(article: int) -> int:
        """Price of one piece."""
        return 65

    [program] = shop.chat(SHOP, [price, closing], max_steps=3)
    assert "closed" in [message["content"] for message in program.messages]


def test_a_constructor_that_fails_leaves_no_thread(random_folder, monkeypatch):
    threads = set(threading.enumerate())
    with pytest.raises(StartupError):
        LLM(random_folder, dataclasses.replace(SMALL, kv_bytes=1))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LLM(random_folder, SMALL)
    assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("call", [lambda llm: llm.generate("hi", EIGHT), lambda llm: llm.close()])
def test_an_async_tool_is_told_not_to_wait_for_agents(shop, call):
    @tool
    async def price(article: int) -> str:
        """Price of one piece."""
        return str(call(shop))

    [program] = shop.chat(SHOP, [price], max_steps=2)
    [result] = [message["content"] for message in program.messages if message["role"] == "tool"]
    assert "async tool must not wait" in result


def test_tools_may_ask_the_same_llm(shop):
    """A plain one from its thread, an async one through the engine; both while all slots are taken by their callers."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)

    @tool
    def price(article: int) -> str:
        """Price of one piece."""
        return shop.chat([[HI], SHOP], params=params)[0].finish_reason

    @tool(name="calculator")
    async def engine(expression: str) -> str:
        """Value of a sum."""
        delta = [delta async for delta in shop.engine.generate([5, 6], params)][-1]
        return f"{delta.finish_reason}"

    programs = shop.chat([SHOP] * CHAT.max_seqs * 2, [price, engine], max_steps=3)
    results = {m["content"] for program in programs for m in program.messages if m["role"] == "tool"}
    assert results == {"length"}


def test_a_tool_may_run_agents_that_call_it(shop, monkeypatch):
    """Deeper than it has threads."""
    monkeypatch.setattr(tools, "MAX_THREADS", 1)
    depths = []

    @tool(timeout_s=3600)
    def price(article: int) -> str:
        """Price of one piece."""
        depths.append(len(depths))
        if len(depths) < 4:
            shop.chat(SHOP, [price], max_steps=2)
        return "65"

    [program] = shop.chat(SHOP, [price], max_steps=2)
    assert depths == [0, 1, 2, 3]
    assert "65" in [message["content"] for message in program.messages]


async def test_from_a_running_event_loop_it_blocks_that_loop_only(llm, greedy):
    expected = greedy(llm.engine.tokenizer.encode("hello"), 8)
    [completion] = llm.generate("hello", EIGHT)
    assert list(completion.token_ids) == expected
    [other] = await asyncio.to_thread(llm.generate, "hello", EIGHT)
    assert list(other.token_ids) == expected


def test_tools_of_an_mcp_server(shop):
    server = McpServer(f"{sys.executable} {ROOT / 'examples' / 'mcp_shop.py'}", timeout_s=WAIT_S)
    [program] = shop.chat([SHOP[0], {"role": "user", "content": TOTAL}], tools=[server])
    assert program.text == "The total is 60."
    assert [run.name for request in program.requests for run in request.tools] == ["price", "price", "calculator"]
    with pytest.raises(ToolError, match="no-such-command"):
        shop.chat(SHOP, tools=[McpServer("no-such-command")])
    with pytest.raises(ValueError, match="two tools"):
        shop.chat(SHOP, tools=[server, server])
