"""Sequences of requests as agents send them, each client in its own way: which programs, jobs and waits come of them.

The clients do what is known of Claude Code and OpenCode; openai-agents is the framework itself. Their model writes what
a script says, thoughts and parallel calls among it; everything else is real.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any

import httpx
import pytest
from support.engines import settled
from support.http_server import serving

from astraea_jax.engine.config import EngineConfig
from astraea_jax.frontends.http.tenants import Keys
from astraea_jax.lab.agent_sessions import JOB, SYSTEM, TOOLS, Author, Ticket, make_tokenizer
from astraea_jax.lab.api_clients import Agent, ChatAgent, Counts, Habits, MessagesAgent, News
from astraea_jax.lab.continuity_load import PAGE_BYTES, PAGE_SIZE, pretended_engine

KEY, OTHER_KEY = "key of the first tenant", "key of the second tenant"
NO_TOOLS: dict[str, Any] = {"tools": [], "thinking": {"type": "disabled"}}


@pytest.fixture
async def engine():
    tokenizer = make_tokenizer("drops thoughts")
    config = EngineConfig(max_seqs=8, max_step_tokens=1_024, page_size=PAGE_SIZE, kv_bytes=8_192 * PAGE_BYTES)
    engine = pretended_engine(tokenizer, config, Author(tokenizer))
    await asyncio.to_thread(engine.start)
    yield engine
    await settled(engine)
    engine.shutdown(0)


@pytest.fixture
async def connect(engine):
    """``connect(key, **headers)``: an HTTP client of a server, which sends these headers."""
    async with serving(engine, keys=Keys([KEY, OTHER_KEY])) as server, AsyncExitStack() as stack:

        async def connect(key: str = KEY, headers: dict[str, str] | None = None) -> httpx.AsyncClient:
            every = {"authorization": f"Bearer {key}", "x-astraea-report": "true", **(headers or {})}
            return await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, headers=every, timeout=120))

        yield connect


async def claude_code(connect, session: str, system: str = SYSTEM, *, key=KEY, agent=None, **fields: Any) -> Agent:
    """One conversation of Claude Code; all those of a session come under its name."""
    headers = {"x-claude-code-session-id": session, "anthropic-version": "2023-06-01"}
    headers |= {"x-claude-code-agent-id": agent} if agent else {}
    user = json.dumps({"device_id": "d", "account_uuid": "", "session_id": session})
    habits = Habits(True, True, random.Random(session), {"metadata": {"user_id": user}, **fields})
    return MessagesAgent(await connect(key, headers), habits, system, TOOLS)


async def open_code(connect, session: str, system: str = SYSTEM, *, parent=None, **fields: Any) -> Agent:
    """One conversation of OpenCode; a subagent has a session of its own and names its parent."""
    headers = {"x-session-id": session, "x-session-affinity": session}
    headers |= {"x-parent-session-id": parent} if parent else {}
    return ChatAgent(await connect(KEY, headers), Habits(False, False, random.Random(session), fields), system, TOOLS)


async def turns(agent: Agent, tickets: Sequence[Ticket], before: Counts | None = None) -> list[Counts]:
    """Turns one after the other; the client says more than the results of tools."""
    counts = [] if before is None else [before]
    for ticket in tickets:
        results = [ticket.result(call) for call in range(counts[-1].calls)] if counts else []
        reminder = "<system-reminder>\nThe list of tasks is empty.\n</system-reminder>"
        counts.append(await agent.ask(News(results, reminder) if results else News(question=ticket.question())))
    return counts if before is None else counts[1:]


def tickets(session: int, *turns: int) -> list[Ticket]:
    return [Ticket(session, turn) for turn in turns]


def programs(counts: Sequence[Counts]) -> list[str]:
    return [one.report["program"] for one in counts]


def goes_on(before: Counts, now: Counts) -> bool:
    """Whether all of the turn before was kept, token by token, and its KV came from the device."""
    kept, report = before.prompt + before.output, now.report
    assert report["program"] == before.report["program"]
    assert report["known"] == {"tokens": kept, "message": None, "why": "same"}
    assert (report["resumed"]["source"], report["resumed"]["why"]) == ("device", "")
    return now.cached >= kept - 1


def job_of(engine, name: str):
    [program] = [one for one in engine._scheduler._programs.programs() if one.key[1] == name]
    return program.job


def waits(engine) -> tuple[int, int, int]:
    """How many waits for tools and for humans have ended, and jobs, once the engine has taken in what it was told."""
    engine.check()
    counts = (engine.tool_waits.seconds, engine.human_waits.seconds, engine.job_times)
    tools, humans, jobs = (sum(histogram.counts) for histogram in counts)
    return tools, humans, jobs


async def test_claude_code(connect, engine):
    """A title, the main conversation, a subagent while it waits, the answer, and another question."""
    titles = await claude_code(connect, "s", "Write a title.", **NO_TOOLS)
    [title] = await turns(titles, tickets(9, JOB - 1))
    main = await claude_code(connect, "s")
    first = await turns(main, tickets(1, 0, 1, 2))
    assert (programs([title]), programs(first)) == (["s"], ["s/2"] * 3)
    assert title.report["known"]["why"] == "new"
    assert (first[0].report["known"]["why"], first[0].report["known"]["message"]) == ("messages", 0)
    sub = await claude_code(connect, "s", "You explore.", agent="a")
    found = await turns(sub, tickets(2, 0, 1))
    assert programs(found) == ["s/a"] * 2
    assert job_of(engine, "s/a") is job_of(engine, "s/2") is not job_of(engine, "s")
    found += await turns(sub, tickets(2, JOB - 1), found[-1])
    rest = await turns(main, tickets(1, 3, JOB - 1), first[-1])
    for conversation in (found, [*first, *rest]):
        assert all(goes_on(*pair) for pair in pairwise(conversation))
        assert [one.report["wait"]["kind"] for one in conversation[1:]] == ["tool"] * (len(conversation) - 1)
    assert waits(engine) == (6, 0, 2)
    later = await main.ask(News(question=Ticket(1, JOB).question()))
    assert later.report["program"] == "s/2"
    assert later.report["wait"]["kind"] == "human"
    assert later.report["known"]["why"] == "template"
    assert later.cached >= first[0].prompt - PAGE_SIZE
    assert waits(engine) == (6, 1, 2)


async def test_open_code(connect, engine):
    """A title and the main conversation begin at once under one name; a subagent names its parent."""
    main, titles = await open_code(connect, "ses_1"), await open_code(connect, "ses_1", "Title?", tools=[])
    [first], [title] = await asyncio.gather(turns(main, tickets(1, 0)), turns(titles, tickets(9, JOB - 1)))
    assert sorted(programs([first, title])) == ["ses_1", "ses_1/2"]
    sub = await open_code(connect, "ses_2", "You explore.", parent="ses_1")
    found = await turns(sub, tickets(2, 0, 1, 2))
    assert programs(found) == ["ses_2"] * 3
    assert job_of(engine, "ses_2") is job_of(engine, first.report["program"])
    rest = await turns(main, tickets(1, 1, 2, JOB - 1, JOB), first)
    assert all(goes_on(*pair) for conversation in (found, [first, *rest[:-1]]) for pair in pairwise(conversation))
    assert [one.report["wait"]["kind"] for one in rest] == ["tool", "tool", "tool", "human"]
    assert programs(rest) == programs([first]) * 4
    http = await connect()
    [shown] = (await http.get("/v1/sessions/ses_2")).json()["programs"]
    assert (shown["state"], shown["turns"]) == ("tool_wait", 3)


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_openai_agents(engine, api):
    """Agents that name nothing: every one is a program of its own, and all of its turns go on from the one before."""
    from astraea_jax.lab.stock_agents import Errand, openai_client, stock_agent  # imports the framework, for seconds

    many, count = 4, 3
    async with serving(engine) as server, openai_client(server.port) as client:
        run = stock_agent(client, named=False, api=api)
        errands = [Errand(number, count) for number in range(many)]
        answers = await asyncio.gather(*(run(number, errand) for number, errand in enumerate(errands)))
        assert [answer.strip() for answer in answers] == [errand.answer for errand in errands]
        assert server.door.programs.continued == Counter(new=many, same=many * (count - 1))
    await settled(engine)
    assert engine.stats().programs == many
    views = await asyncio.wrap_future(engine.look(100))
    assert [(view.state, view.turns) for view in views] == [("human_wait", count)] * many
    assert waits(engine) == (many * (count - 1), 0, many)


async def test_tenants_share_neither_sessions_nor_what_is_learned(connect):
    ours = await turns(await claude_code(connect, "s"), tickets(1, *range(4)))
    theirs = await turns(await claude_code(connect, "s", key=OTHER_KEY), tickets(1, *range(4)))
    assert programs(ours) == programs(theirs) == ["s"] * 4
    assert [one.cached for one in ours] == [one.cached for one in theirs]
    assert theirs[0].report["known"]["why"] == "new"
    assert theirs[0].report["resumed"]["source"] == "new"
    predicted = [[one.report["wait"]["predicted_s"] for one in counts[1:]] for counts in (ours, theirs)]
    assert predicted[0][0] == predicted[1][0]  # before either is known
    assert predicted[0][1:] == [pytest.approx(value) for value in _means(ours)]
    assert predicted[1][1:] == [pytest.approx(value) for value in _means(theirs)]


def _means(counts: Sequence[Counts]) -> list[float]:
    """Means of the waits so far."""
    waits = [one.report["wait"]["actual_s"] for one in counts[1:]]
    return [sum(waits[: i + 1]) / (i + 1) for i in range(len(waits) - 1)]
