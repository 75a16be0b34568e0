"""From a model's reply to a message of Anthropic's Messages API, or to the events that build it up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from astraea_jax.agents.reply import CallArguments, CallBegan, CallDropped, CallEnded, Part, Said, Thought
from astraea_jax.engine.generation import Usage
from astraea_jax.frontends.http.blank import Blank

Event = dict[str, Any]
"""Data of a server-sent event; its ``type`` is the event's name."""

PING: Event = {"type": "ping"}
"""Says that the server is alive, and nothing else."""

STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
"""Finish reasons -> stop reasons, where they differ by more than whether a stop sequence has ended the reply."""


class MessageBuilder:
    """One reply as a list of content blocks, and the events that say how it grows.

    Blocks follow each other: each begins when a part of another kind, or another call, comes. Blank text between
    thoughts and calls makes no block of its own.

    Args:
        id: of the message.
        model: name of the model, as the client has written it.
    """

    def __init__(self, id: str, model: str):
        self.content: list[dict[str, Any]] = []
        self._id, self._model = id, model
        self._open: str | None = None
        """Type of the block that grows; it is the last one of ``content``."""
        self._pieces: list[str] = []
        """Its text so far."""
        self._blank = Blank()

    def start(self, input_tokens: int) -> list[Event]:
        """Return the first events."""
        usage = {"input_tokens": input_tokens, "output_tokens": 0}
        usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return [{"type": "message_start", "message": self._message(None, None, usage)}, PING]

    def add(self, parts: Iterable[Part]) -> list[Event]:
        """Take in what the model has written; returns the events that tell it."""
        return [event for part in parts for event in self._add(part)]

    def finish(self, reason: str, stop_sequence: str | None, usage: Usage) -> list[Event]:
        """Take in the end; returns the last events."""
        events = self._close()
        if not self.content:  # clients look into the first block
            events += [*self._begin({"type": "text", "text": ""}), *self._close()]
        delta = {"stop_reason": _stop_reason(reason, stop_sequence), "stop_sequence": stop_sequence}
        return [
            *events,
            {"type": "message_delta", "delta": delta, "usage": usage_of(usage)},
            {"type": "message_stop"},
        ]

    def message(self, reason: str, stop_sequence: str | None, usage: Usage) -> dict[str, Any]:
        """Take in the end; returns the whole message."""
        self.finish(reason, stop_sequence, usage)
        return self._message(_stop_reason(reason, stop_sequence), stop_sequence, usage_of(usage))

    def _message(self, stop_reason: str | None, stop_sequence: str | None, usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(self.content),
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": usage,
        }

    def _add(self, part: Part) -> list[Event]:
        match part:
            case Thought(text):
                return self._write("thinking", {"thinking": "", "signature": ""}, text)
            case Said(text):
                return self._write("text", {"text": ""}, text)
            case CallBegan(id=id, name=name):
                return self._begin({"type": "tool_use", "id": id, "name": name, "input": {}})
            case CallArguments(text=text):
                return self._grow({"type": "input_json_delta", "partial_json": text})
            case CallEnded(call=call):
                self.content[-1]["input"] = call.arguments
                return self._close()
            case CallDropped():
                return self._close()

    def _write(self, kind: str, empty: dict[str, str], text: str) -> list[Event]:
        """Add to a block of text or thought; white space alone does not begin one."""
        begun: list[Event] = []
        if self._open != kind:
            if not (text := self._blank.first(kind, text)):
                return []
            begun = self._begin({"type": kind, **empty})
        self._pieces.append(text)
        return begun + self._grow({"type": f"{kind}_delta", kind: text})

    def _begin(self, block: dict[str, Any]) -> list[Event]:
        closed = self._close()
        self._blank.clear()
        self._open = block["type"]
        self.content.append(block)
        return [*closed, {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}]

    def _grow(self, delta: dict[str, str]) -> list[Event]:
        return [{"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}]

    def _close(self) -> list[Event]:
        kind, text, signed = self._open, "".join(self._pieces), list[Event]()
        if kind is None:
            return []
        self._open, self._pieces = None, []
        if kind != "tool_use":
            self.content[-1][kind] = text
        if kind == "thinking":
            self.content[-1]["signature"] = _signature(text)
            signed = self._grow({"type": "signature_delta", "signature": _signature(text)})
        return [*signed, {"type": "content_block_stop", "index": len(self.content) - 1}]


def usage_of(usage: Usage) -> dict[str, int]:
    """Return token counts as the API has them: tokens of the prompt are counted once, as cached or as not."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
    }


def _stop_reason(reason: str, stop_sequence: str | None) -> str:
    return STOP_REASONS.get(reason) or ("end_turn" if stop_sequence is None else "stop_sequence")


def _signature(thought: str) -> str:
    """Make the signature that clients keep with a thought and send back. It proves nothing."""
    return hashlib.sha256(thought.encode("utf-8", "surrogatepass")).hexdigest()
