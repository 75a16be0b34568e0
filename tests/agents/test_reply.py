"""A turn is read the same however it is cut into pieces."""

from __future__ import annotations

from astraea_jax.agents.formats import named
from astraea_jax.agents.reply import CallArguments, CallBegan, CallEnded, ReplyReader, Said
from astraea_jax.agents.tool_calls import ToolCall

PRICE = {"type": "function", "function": {"name": "price", "parameters": {"type": "object"}}}


def test_text_and_a_call() -> None:
    reader = ReplyReader(named("hermes"), "", [PRICE])
    parts = reader.feed('Look:\n<tool_call>\n{"name": "price", "argu')
    parts += reader.feed('ments": {"item": "lamp"}}\n</tool_call>') + reader.finish()
    call = ToolCall("call_0", "price", {"item": "lamp"})
    assert parts == [
        Said("Look:"),
        CallBegan(0, "call_0", "price"),
        CallArguments(0, '{"item": "lamp"}'),
        CallEnded(0, call),
    ]
    assert reader.reply.calls == [call]
