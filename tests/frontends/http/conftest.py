"""The bundled model behind HTTP, in the test's own event loop, so that what one test compiles serves all."""

import openai
import pytest
from support.engines import end_all_sessions
from support.http_server import serving
from support.sizes import CHAT

from astraea_jax.engine.engine import Engine
from astraea_jax.models import resolve


@pytest.fixture(scope="session")
def bundled():
    engine = Engine.from_folder(resolve("astraea-tiny"), CHAT)
    engine.start()
    yield engine
    engine.shutdown(grace_s=0)


@pytest.fixture
def chatty(bundled):
    """astraea-tiny, which speaks and calls tools, without the sessions of earlier tests."""
    end_all_sessions(bundled)
    return bundled


@pytest.fixture
async def server(chatty):
    async with serving(chatty) as server:
        yield server


@pytest.fixture
async def client(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
