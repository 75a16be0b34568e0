"""``/v1/models``, ``/tokenize`` and ``/detokenize``, in vLLM's shapes."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from astraea_jax.engine.encoding import DOORS
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.calls import door_of, tenant_of
from astraea_jax.frontends.http.chat_schema import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.logprobs import token_text, written
from astraea_jax.frontends.http.routes import JsonRoute, answer
from astraea_jax.frontends.http.sampling_schema import Model, Name, Text, TokenId
from astraea_jax.frontends.http.turns import ChatRequest, TextRequest

router = APIRouter(route_class=JsonRoute, tags=["models"])

STARTED = int(time.time())
MAX_IDS = 2**20


class TokenizeRequest(Model):
    """The body of ``/tokenize``: a text, or a conversation."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Model):
    """The body of ``/detokenize``."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS, fail_fast=True)]


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """Name the models that are served."""
    door = door_of(request)
    names = {"first_id": door.names[0], "last_id": door.names[-1], "has_more": False}
    return answer({"object": "list", "data": [_model(door, name) for name in door.names], **names})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Describe one model."""
    door = door_of(request)
    return answer(_model(door, door.check_model(name)))


def _model(door: Door, name: str) -> dict[str, Any]:
    """Describe a model in vLLM's words, and in Anthropic's."""
    return {
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(STARTED, UTC).isoformat(),
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "astraea_jax",
        "root": door.names[0],
        "parent": None,
        "max_model_len": door.engine.layout.max_context,
    }


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Tokenise a text or a conversation."""
    door = door_of(request)
    door.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either a prompt or messages")
    tenant = tenant_of(request)
    asked: ChatRequest | TextRequest
    if body.prompt is not None:
        asked = TextRequest(tenant=tenant, prompt=body.prompt, add_bos=body.add_special_tokens)
    else:
        asked = ChatRequest(
            tenant=tenant,
            messages=[message.plain() for message in body.messages or ()],
            tools=[{"type": "function", "function": tool.function.plain()} for tool in body.tools or ()],
            template_arguments={} if body.add_generation_prompt else {"add_generation_prompt": False},
        )
    ids = await door.prompt(asked)

    def write() -> Response:
        tokenizer, room = door.engine.tokenizer, door.engine.layout.max_context
        texts = [token_text(tokenizer, token) for token in ids] if body.return_token_strs else None
        return answer({"count": len(ids), "max_model_len": room, "tokens": ids, "token_strs": texts})

    return await written(len(ids), write)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Return the text of tokens."""
    door = door_of(request)
    door.check_model(body.model)

    def decode() -> Response:
        size = door.engine.model_config.vocab_size
        if max(body.tokens, default=0) >= size:
            raise RequestError(f"tokens holds an id outside the vocabulary [0, {size})")
        return answer({"prompt": door.engine.tokenizer.decode(body.tokens)})

    return await DOORS.run(tenant_of(request).owner, len(body.tokens), decode)
