"""OpenAI's Responses API: the core that Open Responses describes.

Responses are stored, if ``store`` is not false, in a bounded table of each tenant for an hour after their last use. A
request that continues one that is gone gets 404. A chain of responses that may call tools is one program to the
scheduler.

With ``background`` a response goes on without its client, who may ask for it, stream its events again, or cancel it. It
ends with the server.

Tools that OpenAI's servers would run (web search, code …) are not: models are not told of them, and the ``tools`` of a
response are those that its model was told of.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.bodies import prepared
from astraea_jax.frontends.http.calls import door_of, program_of, tenant_of
from astraea_jax.frontends.http.errors import Failure, NotFound
from astraea_jax.frontends.http.responses_asked import Asked
from astraea_jax.frontends.http.responses_background import Background, Running
from astraea_jax.frontends.http.responses_items import page
from astraea_jax.frontends.http.responses_output import ResponseBuilder
from astraea_jax.frontends.http.responses_record import Record
from astraea_jax.frontends.http.responses_schema import LARGEST, MAX_NAME, ResponsesRequest
from astraea_jax.frontends.http.responses_store import ResponseStore, Stored
from astraea_jax.frontends.http.responses_writing import Writing
from astraea_jax.frontends.http.routes import DONE, JsonRoute, answer, named, stream
from astraea_jax.frontends.http.turns import ChatRequest
from astraea_jax.frontends.http.usage import cached_header

router = APIRouter(route_class=JsonRoute, prefix="/v1/responses", tags=["responses"])


@router.post("")
async def create(body: ResponsesRequest, request: Request) -> Response:
    """Answer input items: at once, as it is written, or in the background."""
    door, background = door_of(request), _background_of(request)
    model = door.check_model(body.model)
    tenant = tenant_of(request)
    if body.previous_response_id and background.find(tenant.owner, body.previous_response_id):
        raise RequestError("previous_response_id names a response that is still being written; wait for its end")
    program, store = program_of(request, body), _store_of(request)

    def read() -> tuple[Asked, ChatRequest]:
        asked = Asked.of(body, tenant, store, program)
        return asked, asked.chat(door.defaults)

    asked, chat = await prepared(request, read)

    async def begin() -> Writing:
        (turn,) = await door.begin(chat)
        return Writing(asked, turn, ResponseBuilder(asked.response(model, chat.params)), door.engine.tokenizer)

    if body.background:
        running = await background.run(tenant.owner, asked.id, begin)
        return await _followed(request, running.record, -1) if body.stream else answer(running.response)
    writing = await begin()
    if body.stream:
        start = named(writing.builder.start())
        return await stream(
            request, _events(writing), lambda failure: named(writing.failed(failure)) + DONE, start=start
        )
    async for _ in writing.events():
        pass
    return answer(writing.ended, cached_header(writing.turn))


@router.get("/{id}")
async def retrieve(
    id: str,
    request: Request,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=-1, le=LARGEST)] = -1,
) -> Response:
    """Return a stored response, or one in the background as it is now, or its events, those to come among them."""
    found = _found(request, id)
    if not stream:
        return answer(found.response)
    if found.record is None:
        raise RequestError("only the events of responses with background are kept; retrieve this one without stream")
    return await _followed(request, found.record, starting_after)


@router.post("/{id}/cancel")
async def cancel(id: str, request: Request) -> Response:
    """Cancel a response in the background. One that has ended stays as it is."""
    found = _found(request, id)
    if isinstance(found, Running):
        await found.cancel()
    elif not found.response["background"]:
        raise RequestError("only responses with background can be cancelled; this one has ended")
    return answer(found.response)


@router.get("/{id}/input_items")
async def input_items(
    id: str,
    request: Request,
    after: Annotated[str, Query(max_length=MAX_NAME)] | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List the input items of a response, those of the responses that it continues among them."""
    return answer(page(_found(request, id).items, after, limit, order))


@router.delete("/{id}")
async def delete(id: str, request: Request) -> Response:
    """Forget a stored response; one in the background is cancelled first."""
    found = _found(request, id)
    if isinstance(found, Running):
        await found.cancel()
    with suppress(NotFound):  # it was too large to be stored
        _store_of(request).delete(tenant_of(request).owner, id)
    return answer({"id": id, "object": "response", "deleted": True})


def _store_of(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


def _background_of(request: Request) -> Background:
    background: Background = request.app.state.background
    return background


def _found(request: Request, id: str) -> Running | Stored:
    """Return a response of the caller's, one that is being written in the background or one that is stored.

    Raises:
        NotFound: there is none.
    """
    owner = tenant_of(request).owner
    return _background_of(request).find(owner, id) or _store_of(request).get(owner, id)


async def _events(writing: Writing) -> AsyncIterator[bytes]:
    async for events in writing.events():
        yield named(events)
    yield DONE


async def _followed(request: Request, record: Record, after: int) -> Response:
    """Stream the events of a record behind a sequence number; the response goes on without this stream."""

    async def events() -> AsyncIterator[bytes]:
        async for event in record.follow(after):
            yield event
        yield DONE

    def failed(failure: Failure) -> bytes:
        error = {"code": failure.code, "message": failure.message, "param": failure.param}
        return named([{"type": "error", "sequence_number": record.next, **error}]) + DONE

    return await stream(request, events(), failed)
