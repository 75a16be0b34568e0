"""From a model's reply to a response of OpenAI's Responses API, or to the events that build it up."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from astraea_jax.agents.reply import CallArguments, CallBegan, CallDropped, CallEnded, Part, Said, Thought
from astraea_jax.engine.generation import Usage
from astraea_jax.frontends.http.blank import Blank
from astraea_jax.frontends.http.responses_items import item_id

Event = dict[str, Any]
"""Data of a server-sent event; its ``type`` is the event's name."""

KINDS = {"reasoning": "reasoning_text", "message": "output_text"}
"""Items that hold text -> the type of their one content part."""


class ResponseBuilder:
    """One response as a list of output items, and the events that say how it grows.

    Items follow each other: each begins when a part of another kind, or another call, comes. Blank text between
    thoughts and calls makes no item of its own.

    Args:
        response: everything of the response object but ``status``, ``output``, ``usage`` and what says why it ended.
    """

    def __init__(self, response: dict[str, Any]):
        self._response = response
        self.output: list[dict[str, Any]] = []
        self.status = "in_progress"
        """Until the end."""
        self._sequence = 0
        self._open: str | None = None
        """Type of the item that grows; it is the last one of ``output``."""
        self._pieces: list[str] = []
        """Its text, or its arguments, so far."""
        self._logprobs: list[dict[str, Any]] = []
        """Of its tokens, if it is a message."""
        self._held_tokens, self._held_logprobs = 0, list[dict[str, Any]]()
        """Of tokens whose text has not come yet."""
        self._thought_tokens = 0
        self._blank = Blank()

    def start(self, status: str = "in_progress") -> list[Event]:
        """Return the first events; ``status`` is ``"in_progress"``, or ``"queued"`` until the model writes."""
        self.status = status
        begun = self.response(status)
        return [self._event("response.created", response=begun), self._event(f"response.{status}", response=begun)]

    def add(self, parts: Sequence[Part], tokens: int = 0, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """Take in what the model has written; returns the events that tell it.

        Args:
            parts: what it has written. It may lag behind the tokens, since some text can be read only later.
            tokens: how many tokens have come.
            logprobs: of these tokens, if they were asked for; those of text are passed on.
        """
        begun: list[Event] = []
        if self.status == "queued":
            self.status = "in_progress"
            begun = [self._event("response.in_progress", response=self.response(self.status))]
        self._held_tokens += tokens
        self._held_logprobs += logprobs
        events = [event for part in parts for event in self._add(part)]
        if parts:
            if all(isinstance(part, Thought) for part in parts):
                self._thought_tokens += self._held_tokens
            self._held_tokens, self._held_logprobs = 0, []
        return [*begun, *events]

    def finish(self, reason: str, usage: Usage) -> list[Event]:
        """Take in the end, and the turn's finish reason; returns the last events."""
        status = "incomplete" if reason == "length" else "completed"
        events = self._close(status)
        if not self.output:
            events += [*self._begin("message", {"role": "assistant", "content": []}), *self._close(status)]
        details = {"reason": "max_output_tokens"} if reason == "length" else None
        counts = usage_of(usage, self._thought_tokens)
        response = self.response(status, counts, incomplete_details=details, completed_at=int(time.time()))
        return [*events, self._event(f"response.{status}", response=response)]

    def fail(self, code: str, message: str) -> list[Event]:
        """Take in that the reply cannot be finished; returns the last events."""
        error = {"code": code, "message": message}
        events = self._close("incomplete")
        return [*events, self._event("response.failed", response=self.response("failed", error=error))]

    def cancel(self) -> list[Event]:
        """Take in that the client has cancelled the reply; returns the last events, of which the API names none."""
        events = self._close("incomplete")
        return [*events, self._event("response.incomplete", response=self.response("cancelled"))]

    def response(self, status: str, usage: dict[str, Any] | None = None, **ended: Any) -> dict[str, Any]:
        """Return the response object as it is now."""
        why = {"error": None, "incomplete_details": None, "completed_at": None} | ended
        return self._response | {"status": status, "output": list(self.output), "usage": usage} | why

    def _add(self, part: Part) -> list[Event]:
        match part:
            case Thought(text):
                return self._write("reasoning", {"summary": [], "content": []}, text)
            case Said(text):
                return self._write("message", {"role": "assistant", "content": []}, text)
            case CallBegan(id=id, name=name):
                return self._begin("function_call", {"call_id": id, "name": name, "arguments": ""})
            case CallArguments(text=text):
                self._pieces.append(text)
                return [self._of_item("response.function_call_arguments.delta", delta=text)]
            case CallEnded():
                return self._close("completed")
            case CallDropped():
                return self._close("incomplete")

    def _write(self, kind: str, empty: dict[str, Any], text: str) -> list[Event]:
        """Add to an item of text or thought; white space alone does not begin one."""
        begun: list[Event] = []
        if self._open != kind:
            if not (text := self._blank.first(kind, text)):
                return []
            begun = self._begin(kind, empty)
        self._pieces.append(text)
        extra = {}
        if kind == "message":
            extra = {"logprobs": self._held_logprobs}
            self._logprobs += self._held_logprobs
            self._held_logprobs = []
        return [*begun, self._of_item(f"response.{KINDS[kind]}.delta", content_index=0, delta=text, **extra)]

    def _begin(self, kind: str, item: dict[str, Any]) -> list[Event]:
        events = self._close("completed")
        self._blank.clear()
        self._open = kind
        item = {"type": kind, "id": item_id(kind), "status": "in_progress", **item}
        self.output.append(item)
        events.append(self._event("response.output_item.added", output_index=len(self.output) - 1, item=item))
        if kind in KINDS:
            part = self._part(kind)
            events.append(self._of_item("response.content_part.added", content_index=0, part=part))
        return events

    def _close(self, status: str) -> list[Event]:
        kind, text = self._open, "".join(self._pieces)
        if kind is None:
            return []
        item = {**self.output[-1], "status": status}
        if kind == "function_call":
            item["arguments"] = text
            events = [
                self._of_item("response.function_call_arguments.done", name=item["name"], arguments=text),
            ]
        else:
            part = self._part(kind, text)
            item["content"] = [part]
            extra = {"logprobs": self._logprobs} if kind == "message" else {}
            events = [
                self._of_item(f"response.{KINDS[kind]}.done", content_index=0, text=text, **extra),
                self._of_item("response.content_part.done", content_index=0, part=part),
            ]
        self.output[-1] = item
        self._open, self._pieces, self._logprobs = None, [], []
        return [
            *events,
            self._event("response.output_item.done", output_index=len(self.output) - 1, item=item),
        ]

    def _part(self, kind: str, text: str = "") -> dict[str, Any]:
        part: dict[str, Any] = {"type": KINDS[kind], "text": text}
        return part | {"annotations": [], "logprobs": self._logprobs} if kind == "message" else part

    def _of_item(self, type: str, **fields: Any) -> Event:
        """An event about the last item."""
        return self._event(type, item_id=self.output[-1]["id"], output_index=len(self.output) - 1, **fields)

    def _event(self, type: str, **fields: Any) -> Event:
        event = {"type": type, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event


def reply_messages(output: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return output items as the assistant's message in Chat Completions' shape, for the responses that continue."""
    turn: dict[str, Any] = {"role": "assistant", "content": ""}
    for item in output:
        match item["type"]:
            case "message":
                turn["content"] += item["content"][0]["text"]
            case "reasoning":
                turn["reasoning_content"] = turn.get("reasoning_content", "") + item["content"][0]["text"]
            case "function_call" if item["status"] == "completed":
                function = {"name": item["name"], "arguments": json.loads(item["arguments"])}
                call = {"id": item["call_id"], "type": "function", "function": function}
                turn.setdefault("tool_calls", []).append(call)
    return [turn]


def usage_of(usage: Usage, thought_tokens: int) -> dict[str, Any]:
    """Return token counts as the API has them."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": min(thought_tokens, usage.output_tokens)},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }
