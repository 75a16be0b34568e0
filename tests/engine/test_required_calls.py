"""A random model that must call a tool does, in every format: its calls are read, and valid under the tool's schema."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from support.sizes import SMALL

from astraea_jax.agents.formats import named
from astraea_jax.agents.reply import ReplyReader
from astraea_jax.engine.call_syntax import SYNTAXES, WAYS
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.engine.sampling import SamplingParams

FORMATS = {name: name for name in SYNTAXES} | {way: format for format, _, way in WAYS}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {
            "type": "object",
            "properties": {
                "b": {"enum": ["x", "y"]},
                "c": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2},
            },
            "required": ["b"],
            "additionalProperties": False,
        }
    },
    "required": ["a"],
    "additionalProperties": False,
}
"""Small, since each byte is a token."""
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]


@pytest.mark.parametrize("name", sorted(SYNTAXES))
async def test_a_random_model_calls(name, make_engine, monkeypatch):
    engine = make_engine(SMALL)
    monkeypatch.setitem(SYNTAXES, "tested", SYNTAXES[name])
    grammar = GrammarCompiler(engine.tokenizer).tool_calls(TOOLS, parallel=False, format="tested")
    spaces = tuple((token, -20.0) for token in engine.tokenizer.encode(" \n\r\t"))  # or it would write little else
    params = SamplingParams(max_tokens=250, temperature=1.0, seed=3, grammar=grammar, logit_bias=spaces)
    text = await engine.generate([1, 2, 3], params).text()
    reader = ReplyReader(named(FORMATS[name]), "", TOOLS)
    reader.feed(text)
    reader.finish()
    reply = reader.reply
    assert (reply.text, reply.errors) == ("", []), text
    [call] = reply.calls
    assert call.name == "f"
    jsonschema.validate(call.arguments, PARAMETERS)
