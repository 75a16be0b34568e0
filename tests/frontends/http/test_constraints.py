"""What a request asks for becomes a grammar, with the thoughts of the model's own format before it."""

from __future__ import annotations

from typing import Any

import pytest
from support.constrained import follow, merged

from astraea_jax.agents.formats import named
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.frontends.http.constraints import Constraints
from astraea_jax.frontends.http.tenants import Tenant
from astraea_jax.frontends.http.turns import ChatRequest

TOKENS = {
    "hermes": ["<think>", "</think>", "<tool_call>", "</tool_call>"],
    "mistral": ["[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"],
    "gemma": ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'],
    "harmony": ["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|call|>", "<|end|>"],
}
PROMPTS = {
    "hermes": ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"),
    "mistral": ("[INST]Hi[/INST]", "[INST]Hi[/INST][THINK]"),
    "gemma": ("<|turn>model\n", "<|turn>model\n<|channel>thought\n"),
}
ASKED = {"type": "json_schema", "schema": {"type": "integer"}}


def request(**more: Any) -> ChatRequest:
    return ChatRequest(tenant=Tenant("test", "test"), messages=[{"role": "user", "content": "Hi"}], **more)


@pytest.mark.parametrize("name", PROMPTS)
async def test_a_thought_in_the_format_of_the_model_comes_before_the_answer(name: str) -> None:
    tokenizer, format = merged(*TOKENS[name]), named(name)
    constraints = Constraints(GrammarCompiler(tokenizer), tokenizer, format, tokenizer.vocab_size)
    [begin, end] = format.thoughts[0]
    closed, opened = [await constraints.of(request(constraint=ASKED), prompt) for prompt in PROMPTS[name]]
    assert closed is not None
    assert opened is not None
    assert follow(closed, tokenizer, f"{begin}Is it 7?{end}\n42")
    assert follow(closed, tokenizer, "42")
    assert not follow(closed, tokenizer, "Is it 7?")
    assert follow(opened, tokenizer, f"Is it 7?{end}\n42")
    assert not follow(opened, tokenizer, "42")


async def test_gpt_oss_thinks_and_answers_in_channels() -> None:
    tokenizer, format = merged(*TOKENS["harmony"], end="<|return|>"), named("harmony")
    constraints = Constraints(GrammarCompiler(tokenizer), tokenizer, format, tokenizer.vocab_size)
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
    form = await constraints.of(request(constraint=ASKED), "<|start|>assistant")
    calls = await constraints.of(request(tools=tools, tool_choice="required"), "<|start|>assistant")
    assert form is not None
    assert calls is not None
    for text in (f"{thought}<|channel|>final<|message|>42", "<|channel|>final<|message|>42", f"{thought}42"):
        assert follow(form, tokenizer, text)
        assert not follow(form, tokenizer, text.replace("42", "x"))
    for text in (call, thought + call):
        assert follow(calls, tokenizer, text)
    assert not follow(calls, tokenizer, f"{thought}<|channel|>final<|message|>42")
