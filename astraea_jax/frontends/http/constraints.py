"""Grammars that requests ask for: a form of the answer, or calls that must be made or must fit their schemas."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from astraea_jax.agents.formats import CallFormat
from astraea_jax.engine.grammar import GrammarCompiler
from astraea_jax.engine.lark_text import Thought
from astraea_jax.engine.sampling import Grammar
from astraea_jax.engine.thought_budget import ThoughtBudget
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.turns import ChatRequest, Request
from astraea_jax.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)

PROBE = {"name": "probe", "strict": True, "parameters": {"type": "object", "properties": {}}}


class Constraints:
    """Compiles what requests ask for.

    Args:
        compiler: compiles them.
        tokenizer: of the model.
        call_format: how the model writes calls and thoughts.
        vocab_size: tokens that the model tells apart.
    """

    def __init__(self, compiler: GrammarCompiler, tokenizer: Tokenizer, call_format: CallFormat, vocab_size: int):
        self._compiler = compiler
        self._format = call_format
        self._added_tokens = {text: i for text, i in tokenizer.added_tokens().items() if i < vocab_size}
        self._told_that_unbounded = False
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="astraea-grammar")
        self._strict_in_text: bool | None = None
        """Whether calls in free text can be constrained in this model's format; None: nobody has asked yet."""

    @property
    def bounds_thoughts(self) -> bool:
        """Whether budgets of thoughts have an effect: one token each begins and ends a thought."""
        return any(self._added_tokens.keys() >= {*tags} for tags in self._format.thoughts)

    async def of(self, request: Request, tail: str) -> Grammar | None:
        """Compile the grammar of a request whose prompt ends with ``tail``; None: it is free.

        Raises:
            RequestError: what is asked for cannot be constrained.
        """
        thought = self._format.thought(tail, self._added_tokens)
        compile, grammar = self._chosen(request, thought), None
        if compile is not None:
            grammar = await asyncio.get_running_loop().run_in_executor(self._threads, compile)
        if isinstance(request, ChatRequest) and request.thought_tokens is not None:
            grammar = self._bounded(request.thought_tokens, thought, grammar)
        return grammar

    def _bounded(self, count: int, thought: Thought | None, grammar: Grammar | None) -> Grammar | None:
        tokens = self._added_tokens
        if thought is not None and thought.begin in tokens and thought.end in tokens:
            return ThoughtBudget(count, tokens[thought.begin], tokens[thought.end], thought.opened, grammar)
        if not self._told_that_unbounded:
            log.warning("thoughts are not bounded: this model has no tokens that begin and end them")
        self._told_that_unbounded = True
        return grammar

    def _chosen(self, request: Request, thought: Thought | None) -> Callable[[], Grammar | None] | None:
        if not isinstance(request, ChatRequest):
            return None if request.constraint is None else partial(self._form, request.constraint, None)
        must_call = request.tool_choice not in ("auto", "none")
        if must_call or (request.tools and request.tool_choice == "auto" and _any_strict(request.tools)):
            if request.constraint is not None:
                raise RequestError("response_format and tools that are required or strict exclude each other")
            return partial(self._calls, request, must_call, thought)
        if request.constraint is None:
            return None
        return partial(self._form, request.constraint, thought and replace(thought, answer=self._format.answer))

    def _form(self, constraint: Mapping[str, Any], thought: Thought | None) -> Grammar:
        kind = constraint["type"]
        match kind:
            case "json_object":
                return self._compiler.json_object(thought=thought)
            case "json_schema":
                return self._compiler.json_schema(constraint["schema"], thought=thought)
            case "regex":
                return self._compiler.regex(constraint["regex"], thought=thought)
            case "lark":
                return self._compiler.lark(constraint["lark"], thought=thought)
            case "choice":
                choices = " | ".join(map(json.dumps, constraint["choice"]))
                return self._compiler.lark(f"start: {choices}", thought=thought)
        raise RequestError(f"the text cannot be constrained by {str(kind)[:60]!r}")

    def _calls(self, request: ChatRequest, required: bool, thought: Thought | None) -> Grammar | None:
        if not required and not self._strict_in_text_is_served():
            return None
        return self._compiler.tool_calls(
            request.tools,
            None if request.tool_choice in ("auto", "required") else request.tool_choice,
            request.parallel_calls,
            self._format.name,
            required=required,
            thought=thought,
        )

    def _strict_in_text_is_served(self) -> bool:
        """Whether this model's format has calls that can be constrained within text; frameworks ask for it always."""
        if self._strict_in_text is None:
            try:
                probe = {"type": "function", "function": PROBE}
                self._compiler.tool_calls([probe], format=self._format.name, required=False)
                self._strict_in_text = True
            except RequestError as error:
                log.warning("strict tools are held to their schemas only where a call is required: %s", error)
                self._strict_in_text = False
        return self._strict_in_text


def _any_strict(tools: Sequence[Mapping[str, Any]]) -> bool:
    return any(tool["function"].get("strict") for tool in tools)
