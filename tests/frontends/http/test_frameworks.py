"""Agent frameworks, unmodified, run their own tool loops with the bundled model behind a server."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest
from pydantic import BaseModel
from support.frameworks import Framework, LangGraph, OpenAIAgents, PydanticAI

FRAMEWORKS = [(kind, api) for kind in (OpenAIAgents, PydanticAI, LangGraph) for api in kind.apis]
ANSWER = "The total is 60."


class Judgement(BaseModel):
    """What kind of question it is."""

    about: Literal["prices", "stocks"]
    easy: bool


@pytest.fixture(scope="module")
def url(serve):
    with serve("--model=astraea-tiny") as server:
        yield server.http


@pytest.fixture(params=FRAMEWORKS, ids=lambda pair: f"{pair[0].__name__}-{pair[1]}")
async def framework(request, url):
    kind, api = request.param
    framework = kind(url, api)
    yield framework
    await framework.close()


async def test_sixteen_agents_at_once(framework: Framework):
    assert await asyncio.gather(*[framework.ask() for _ in range(16)]) == [ANSWER] * 16


async def test_an_agent_streams_its_answer(framework: Framework):
    """What a client has not read yet reaches it in one piece, so a short answer may be one: not every time."""
    answers = [await framework.stream() for _ in range(5)]
    assert ["".join(pieces) for pieces in answers] == [ANSWER] * 5
    assert any(len(pieces) > 1 for pieces in answers)


async def test_an_answer_has_the_type_that_is_asked_for(framework: Framework):
    assert isinstance(await framework.typed(Judgement), Judgement)
