"""Bodies full of errors: as cheap to refuse as others are to read."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from astraea_jax.frontends.http.chat_schema import ChatCompletionRequest
from astraea_jax.frontends.http.completions import CompletionRequest
from astraea_jax.frontends.http.messages_schema import CountRequest, MessagesRequest
from astraea_jax.frontends.http.responses_schema import ResponsesRequest
from astraea_jax.frontends.http.tokens import DetokenizeRequest, TokenizeRequest

BODIES = (
    *(ChatCompletionRequest, CompletionRequest, CountRequest, MessagesRequest, ResponsesRequest),
    *(TokenizeRequest, DetokenizeRequest),
)
MANY = 2000
HI = [{"role": "user", "content": "hi"}]


def schemas(of: Any) -> Iterator[dict[str, Any]]:
    """All parts of a schema of pydantic's that values are checked by."""
    if isinstance(of, dict):
        if isinstance(of.get("type"), str):
            yield of
        for name, part in of.items():
            if name != "json_schema_input_schema":
                yield from schemas(part)
    elif isinstance(of, list | tuple):
        for part in of:
            yield from schemas(part)


@pytest.mark.parametrize("body", BODIES)
def test_every_list_stops_at_its_first_error(body: type[BaseModel]):
    lists = [schema for schema in schemas(body.__pydantic_core_schema__) if schema["type"] == "list"]
    assert lists
    assert all(schema.get("fail_fast") or schema.get("items_schema", {}).get("type") == "any" for schema in lists)


@pytest.mark.parametrize(
    ("body", "given"),
    [
        (CompletionRequest, {"prompt": [[]] * MANY}),
        (CompletionRequest, {"prompt": [None] * MANY}),
        (CompletionRequest, {"prompt": [[-1] * MANY] * 100}),
        (CompletionRequest, {"prompt": "a", "stop": [[]] * MANY}),
        (DetokenizeRequest, {"tokens": [-1] * MANY}),
        (ChatCompletionRequest, {"messages": [{}] * MANY}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [0] * MANY}] * 100}),
        (ChatCompletionRequest, {"messages": HI, "logit_bias": {str(i): [] for i in range(MANY)}}),
        (ChatCompletionRequest, {"messages": HI, "logit_bias": {f"x{i}": 1 for i in range(MANY)}}),
        (MessagesRequest, {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [0] * MANY}] * 9}),
        (ResponsesRequest, {"model": "m", "input": [{"role": "user", "content": [0] * MANY}] * 9}),
        (ResponsesRequest, {"model": "m", "metadata": {str(i): [] for i in range(MANY)}}),
    ],
)
def test_a_body_full_of_errors_gives_a_few(body: type[BaseModel], given: dict[str, Any]):
    with pytest.raises(ValidationError) as refused:
        body.model_validate(given)
    assert refused.value.error_count() < 10
