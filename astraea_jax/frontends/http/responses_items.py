"""Items of a conversation as the Responses API lists them, refers to them and pages through them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import TypeAdapter

from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.responses_schema import (
    CallItem,
    CallOutputItem,
    InputItem,
    Item,
    ItemReference,
    MessageItem,
    Parts,
    ReasoningItem,
    RefusalPart,
)

PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc", "function_call_output": "fco"}
"""Items -> how their ids begin."""

_ITEM: TypeAdapter[Item] = TypeAdapter(Item)


def item_id(type: str) -> str:
    """Make the id of an item of this type."""
    return f"{PREFIXES[type]}_{secrets.token_hex(16)}"


def resolved(items: Sequence[InputItem], find: Callable[[str], dict[str, Any]]) -> list[Item]:
    """Return the items, with those themselves in the place of references.

    Args:
        items: of a request.
        find: finds an item by its id.

    Raises:
        NotFound: there is no item of such an id.
    """
    return [_ITEM.validate_python(find(item.id)) if isinstance(item, ItemReference) else item for item in items]


def listed(item: Item) -> dict[str, Any]:
    """Return an item as the API shows it, with an id."""
    shown: dict[str, Any] = {"id": item.id or item_id(item.type), "type": item.type, "status": "completed"}
    match item:
        case MessageItem(role=role):
            kind = "output_text" if role == "assistant" else "input_text"
            return shown | {"role": role, "content": _parts(item.content, kind)}
        case ReasoningItem():
            summary, content = _parts(item.summary, "summary_text"), _parts(item.content, "reasoning_text")
            return shown | {"summary": summary, "content": content}
        case CallItem():
            return shown | {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        case CallOutputItem():
            return shown | {"call_id": item.call_id, "output": _parts(item.output, "input_text")}


def page(
    items: Sequence[dict[str, Any]], after: str | None, limit: int, order: Literal["asc", "desc"]
) -> dict[str, Any]:
    """Return up to ``limit`` items as a list object: the first ones in this order, or those behind the item ``after``.

    Raises:
        RequestError: there is no such item.
    """
    ordered = items if order == "asc" else items[::-1]
    begin = 0
    if after is not None:
        begin = 1 + next((i for i, item in enumerate(ordered) if item["id"] == after), -1)
        if not begin:
            raise RequestError(f"after is {after[:80]!r}, which is none of the input items of this response")
    shown = ordered[begin : begin + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": begin + limit < len(ordered),
    }


def _parts(parts: Parts, kind: str) -> list[dict[str, Any]]:
    more: dict[str, Any] = {"annotations": []} if kind == "output_text" else {}
    return [
        {"type": "refusal", "refusal": part.refusal}
        if isinstance(part, RefusalPart)
        else {"type": kind, "text": part.text, **more}
        for part in parts
    ]
