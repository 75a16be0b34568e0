"""``/v1/completions``: what follows a text, or token ids, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from astraea_jax.agents.reply import Said
from astraea_jax.engine.generation import TokenLogprob
from astraea_jax.engine.sampling import MAX_LOGPROBS
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.calls import door_of, program_of, tenant_of
from astraea_jax.frontends.http.door import Door
from astraea_jax.frontends.http.logprobs import count, text_logprobs, written
from astraea_jax.frontends.http.routes import DONE, JsonRoute, answer_of_choices, event, stream
from astraea_jax.frontends.http.sampling_schema import LARGE, SamplingFields, Text, TokenId
from astraea_jax.frontends.http.turns import TextRequest, Turn, merged
from astraea_jax.frontends.http.usage import cached_header, usage_of

router = APIRouter(route_class=JsonRoute, tags=["completions"])

MAX_PROMPTS = 128
MAX_CHOICES = 256
"""Prompts times ``n``."""
DEFAULT_TOKENS = 16
"""OpenAI's ``max_tokens`` where none is given."""

Ids = Annotated[list[TokenId], Field(min_length=1, max_length=2**20, fail_fast=True)]


class CompletionRequest(SamplingFields):
    """The body."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=LARGE)] | None = None
    suffix: Text | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """All of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return [*self.prompt]

    def refuse_unserved(self) -> None:
        """Refuse what is known and not served.

        Raises:
            RequestError: there is such a field.
        """
        if self.suffix:
            raise RequestError("suffix is not served: no text is put in before another one")
        if self.echo and self.logprobs is not None:
            raise RequestError("echo with logprobs is not served: the prompt's tokens have none")
        if (self.best_of or 1) > (self.n or 1):
            raise RequestError("best_of above n is not served")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise RequestError(f"{len(self.prompts)} prompts times n {self.n} are more than {MAX_CHOICES}")


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue a text, or several."""
    door = door_of(request)
    name = door.check_model(body.model)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": name}
    body.refuse_unserved()
    texts = _Texts(door, body, head, await _begin(door, _requests(request, body, door)))
    if body.stream:
        return await stream(request, texts.events(), lambda failure: event(failure.openai()))
    return await texts.whole()


def _requests(request: Request, body: CompletionRequest, door: Door) -> list[TextRequest]:
    program = program_of(request, body)
    params = body.sampling(door.defaults, body.max_tokens or DEFAULT_TOKENS, body.logprobs)
    constraint = None if body.structured_outputs is None else body.structured_outputs.constraint()
    tenant = tenant_of(request, body.cache_salt)
    return [
        TextRequest(
            tenant=tenant,
            params=params,
            n=body.n or 1,
            constraint=constraint,
            prompt=prompt,
            **program,
        )
        for prompt in body.prompts
    ]


async def _begin(door: Door, requests: Sequence[TextRequest]) -> list[list[Turn]]:
    """Begin all requests, or none."""
    begun: list[list[Turn]] = []
    try:
        for request in requests:
            begun.append(await door.begin(request))
    except BaseException:
        for turns in begun:
            for turn in turns:
                turn.cancel()
        raise
    return begun


class _Texts:
    """Makes the answer.

    Args:
        door: has the tokenizer.
        body: of the request.
        head: fields that every object has.
        turns: the choices of each prompt.
    """

    def __init__(self, door: Door, body: CompletionRequest, head: dict[str, Any], turns: Sequence[Sequence[Turn]]):
        self._tokenizer = door.engine.tokenizer
        self._body, self._head, self.prompts = body, head, turns
        self._turns = [turn for of_one in turns for turn in of_one]
        self._lengths = [0] * len(self._turns)

    async def whole(self) -> Response:
        """All choices at their end."""
        logprobs: list[list[TokenLogprob]] = [[] for _ in self._turns]
        async for index, output in merged(self._turns):
            logprobs[index] += output.logprobs

        def write() -> Response:
            choices = (
                self._choice(index, self._echo(index) + turn.reply.text, logprobs[index])
                for index, turn in enumerate(self._turns)
            )
            header = cached_header(*(turns[0] for turns in self.prompts))
            return answer_of_choices({**self._head, "usage": self._usage()}, choices, header)

        return await written(sum(map(count, logprobs)), write)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events."""
        tells_usage = self._body.include_usage or self._turns[0].about.told
        head = {**self._head, "usage": None} if tells_usage else self._head
        echoed: set[int] = set()
        async for index, output in merged(self._turns):
            text = "".join(part.text for part in output.parts if isinstance(part, Said))
            if index not in echoed:
                echoed.add(index)
                text = self._echo(index) + text
            if text or output.logprobs or self._turns[index].finish_reason:
                choice = await written(count(output.logprobs), partial(self._choice, index, text, output.logprobs))
                yield event({**head, "choices": [choice]})
        usage = event({**head, "choices": [], "usage": self._usage()}) if tells_usage else b""
        yield usage + DONE

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        turn = self._turns[index]
        shown = None
        if self._body.logprobs is not None:
            shown = text_logprobs(self._tokenizer, logprobs, self._lengths[index])
            self._lengths[index] += sum(map(len, shown["tokens"]))
        return {
            "index": index,
            "text": text,
            "logprobs": shown,
            "finish_reason": turn.finish_reason,
            "stop_reason": turn.stop_sequence,
        }

    def _echo(self, index: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._body.prompts[index // (self._body.n or 1)]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _usage(self) -> dict[str, Any]:
        return usage_of(*self.prompts)
