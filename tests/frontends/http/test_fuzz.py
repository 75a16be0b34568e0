"""Whatever is sent, it gets an answer, and never one that says the fault is ours."""

import hypothesis
import pytest
import schemathesis
from support.engines import settled
from support.http_server import MODEL

from astraea_jax.agents import formats
from astraea_jax.frontends.http.app import make_app
from astraea_jax.frontends.http.door import Door

ROUTES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("path", ROUTES)
async def test_requests_made_of_the_schema(chatty, path):
    door = Door(chatty, formats.choose(chatty.tokenizer), [MODEL])
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(door))
    cases = schema[path]["POST"].as_strategy() | schema[path]["POST"].as_strategy(
        generation_mode=schemathesis.GenerationMode.NEGATIVE
    )
    statuses = set()

    @hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(cases)
    def send(case):
        if isinstance(case.body, dict):  # or else the tiny model would write all that its context has room for
            case.body = {**case.body, "max_tokens": 2, "max_completion_tokens": 2}
        answer = case.call()
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 404, 405, 413, 429), (answer.text, case.body)
        assert answer.status_code == 200 or answer.json()["error"]["message"]

    send()
    assert 400 in statuses
    await settled(chatty)
    assert (door.waiting.choices, door.waiting.tokens) == (0, 0)
