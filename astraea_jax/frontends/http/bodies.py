"""Bodies of requests as JSON: bounded before they are parsed; long ones are parsed and validated in a thread."""

from __future__ import annotations

from collections.abc import Callable
from email.message import Message
from typing import Any, TypeVar

import pydantic_core
from fastapi import Request
from fastapi.exceptions import RequestValidationError

from astraea_jax.engine.encoding import TextPool
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.calls import tenant_of
from astraea_jax.frontends.http.errors import NotJson, TooLarge

T = TypeVar("T")

LONG_BODY = 2**16
"""Bytes from which a body is read in a thread."""
MAX_VALUES = 2**18
"""Texts, names, lists and objects of one body, which cost far more than their bytes: 10,000 messages that each call a
tool have 180,000. Numbers are not counted, since a prompt may be a million token ids and they cost as good as
nothing."""

Validate = Callable[[Any], tuple[Any, list[Any]]]
"""Returns a value by a schema, and what is wrong with it."""

BODIES = TextPool(threads=1)
"""Reads long bodies; apart from prompts, which take their threads for longer."""


async def read_body(request: Request, validate: Validate) -> Any:
    """Return the body of a request, parsed and validated.

    A client that vanishes has its body left unread if no thread has begun with it.

    Args:
        request: has the whole body already.
        validate: by the schema of the route.

    Raises:
        NotJson: the content type says that it is something else.
        TooLarge: it has too many values.
        RequestError, RequestValidationError: it is no JSON, or not what the schema wants.
        Overloaded: too many bodies wait.
    """
    body = await request.body()
    if not body:
        raise RequestError("the body is empty; send a JSON object")
    _check_type(request.headers.get("content-type", ""))
    return await prepared(request, lambda: _read(body, validate))


async def prepared(request: Request, prepare: Callable[[], T]) -> T:
    """Return ``prepare()``, which goes through a body that has been read, computed in a thread if it is long.

    Raises:
        Overloaded: too many bodies wait.
    """
    size = len(await request.body())
    return prepare() if size < LONG_BODY else await BODIES.run(tenant_of(request).owner, size, prepare)


def _check_type(content_type: str) -> None:
    """Refuse what is not called JSON.

    A page of a stranger's can make a browser send forms and plain text to this machine without asking, but not JSON:
    so being strict keeps such pages out.
    """
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    if message.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
        given = f"not {content_type[:100]!r}" if content_type else "but there is none"
        raise NotJson(f"the header content-type must be application/json, {given}")


def _read(body: bytes, validate: Validate) -> Any:
    if has_more_values(body, MAX_VALUES):
        raise TooLarge(
            f"the body has more than {MAX_VALUES} texts, names, lists and objects, which is the most that is read"
        )
    try:
        given = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:  # its text tells the place, and nothing of the body
        raise RequestError(f"the body is not valid JSON: {error}") from None
    value, errors = validate(given)
    if errors:
        raise RequestValidationError(errors)
    return value


def has_more_values(body: bytes, most: int) -> bool:
    """Whether JSON has more texts, names, lists and objects than ``most``; of other bytes it may say anything.

    Costs a few passes over the bytes, and is never slow: only what has few texts is cut at their quotes.
    """
    if len(body) < most:
        return False
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    texts = plain.count(b'"') // 2
    if texts > most or texts + _brackets(plain) <= most:
        return texts > most
    return texts + _brackets(b"".join(plain.split(b'"')[::2])) > most


def _brackets(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")
