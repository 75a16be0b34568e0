"""Clients that keep a history and send it with every request, through each of the APIs.

They treat it as clients do: they print the arguments of calls anew, return thoughts or leave them out, put a header
that is never the same before the system text, and say more than the results of tools. None of them names its session.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import httpx

from astraea_jax.frontends.rpc import wire
from astraea_jax.frontends.rpc.metadata import read_usage
from astraea_jax.models.tokenizer import Tokenizer

MODEL = "tiny"
MAX_TOKENS = 4_096
NO_SAMPLING = {"temperature": 0}


@dataclass(frozen=True)
class News:
    """What a client adds to its history before it asks again."""

    results: Sequence[str] = ()
    """Of the calls of the previous turn, in their order."""
    reminder: str = ""
    """Text that the client puts behind results, in the user's name."""
    notice: str = ""
    """A system message amid the others."""
    question: str = ""
    """What the user says."""


@dataclass(frozen=True)
class Counts:
    """A request, in tokens, and how many tools its turn has called."""

    prompt: int
    cached: int
    output: int
    calls: int
    report: Mapping[str, Any]
    """What the server says of it, if its client asks; see :func:`astraea_jax.frontends.http.usage.report_of`."""


@dataclass(frozen=True)
class Habits:
    """What a client does to its history, and says beside it."""

    returns_thoughts: bool
    changes_header: bool
    random: random.Random
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request."""

    def system(self, text: str) -> list[str]:
        """Return the system text in parts; like Claude Code's, its header is another one each time."""
        header = f"x-anthropic-billing-header: cc_version=2.1.100; cch={self.random.randrange(16**5):05x};"
        return [header, text] if self.changes_header else [text]

    def reordered(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments in some order."""
        return {key: arguments[key] for key in self.random.sample([*arguments], len(arguments))}

    def printed(self, arguments: str) -> str:
        """Print arguments anew."""
        separators = self.random.choice([(",", ":"), (", ", ": ")])
        return json.dumps(self.reordered(json.loads(arguments)), separators=separators)


class Agent(Protocol):
    """One session of a client."""

    async def ask(self, news: News) -> Counts:
        """Send the history with what is new, and keep the answer."""


class ChatAgent:
    """Speaks OpenAI's Chat Completions API."""

    def __init__(self, http: httpx.AsyncClient, habits: Habits, system: str, tools: Sequence[Mapping[str, Any]]):
        self._http, self._habits, self._system, self._tools = http, habits, system, tools
        self._history: list[dict[str, Any]] = []
        self.calls: Sequence[Mapping[str, Any]] = ()
        """Those of the last turn, as the API has them."""

    async def ask(self, news: News) -> Counts:
        for call, result in zip(self.calls, news.results, strict=True):
            self._history.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        said = {"user": news.reminder or news.question, "system": news.notice}
        self._history += [{"role": role, "content": text} for role, text in said.items() if text]
        system = {"role": "system", "content": "\n".join(self._habits.system(self._system))}
        asked = {"model": MODEL, "messages": [system, *self._history], "tools": self._tools, "max_tokens": MAX_TOKENS}
        answer = await _post(self._http, "/v1/chat/completions", {**asked, **self._habits.fields})
        message, usage = answer["choices"][0]["message"], answer["usage"]
        self.calls = message.get("tool_calls") or ()
        self._history.append(self._returned(message))
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Counts(
            usage["prompt_tokens"], cached, usage["completion_tokens"], len(self.calls), usage.get("astraea", {})
        )

    def _returned(self, message: Mapping[str, Any]) -> dict[str, Any]:
        said = {"role": "assistant", "content": message["content"]}
        if self.calls:
            said["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": self._habits.printed(_arguments(call))}}
                for call in self.calls
            ]
        if self._habits.returns_thoughts:
            said |= {key: message[key] for key in ("reasoning", "reasoning_content") if message.get(key)}
        return said


class MessagesAgent:
    """Speaks Anthropic's Messages API."""

    def __init__(self, http: httpx.AsyncClient, habits: Habits, system: str, tools: Sequence[Mapping[str, Any]]):
        self._http, self._habits, self._system = http, habits, system
        functions = [tool["function"] for tool in tools]
        self._tools = [
            {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in functions
        ]
        self._history: list[dict[str, Any]] = []
        self.calls: Sequence[Mapping[str, Any]] = ()
        """Those of the last turn, as the API has them."""

    async def ask(self, news: News) -> Counts:
        blocks: list[dict[str, Any]] = [
            {"type": "tool_result", "tool_use_id": call["id"], "content": result}
            for call, result in zip(self.calls, news.results, strict=True)
        ]
        blocks += [{"type": "text", "text": text} for text in (news.reminder, news.question) if text]
        self._history.append({"role": "user", "content": blocks})
        if news.notice:
            self._history.append({"role": "system", "content": news.notice})
        asked = {
            "model": MODEL,
            "system": [{"type": "text", "text": text} for text in self._habits.system(self._system)],
            "messages": self._history,
            "tools": self._tools,
            "max_tokens": MAX_TOKENS,
            "thinking": {"type": "adaptive"},
        }
        answer = await _post(self._http, "/v1/messages", {**asked, **self._habits.fields})
        content, usage = answer["content"], answer["usage"]
        self.calls = [block for block in content if block["type"] == "tool_use"]
        self._history.append({"role": "assistant", "content": [*map(self._returned, filter(self._returns, content))]})
        cached = usage["cache_read_input_tokens"]
        return Counts(
            usage["input_tokens"] + cached, cached, usage["output_tokens"], len(self.calls), usage.get("astraea", {})
        )

    def _returns(self, block: Mapping[str, Any]) -> bool:
        return self._habits.returns_thoughts or block["type"] != "thinking"

    def _returned(self, block: Mapping[str, Any]) -> dict[str, Any]:
        return {**block, "input": self._habits.reordered(block["input"])} if "input" in block else {**block}


class ResponsesAgent:
    """Speaks OpenAI's Responses API, and stores nothing on the server."""

    def __init__(self, http: httpx.AsyncClient, habits: Habits, system: str, tools: Sequence[Mapping[str, Any]]):
        self._http, self._habits, self._system = http, habits, system
        self._tools = [{"type": "function", **tool["function"]} for tool in tools]
        self._history: list[dict[str, Any]] = []
        self.calls: Sequence[Mapping[str, Any]] = ()
        """Those of the last turn, as the API has them."""

    async def ask(self, news: News) -> Counts:
        for call, result in zip(self.calls, news.results, strict=True):
            self._history.append({"type": "function_call_output", "call_id": call["call_id"], "output": result})
        said = {"user": news.reminder or news.question, "developer": news.notice}
        self._history += [{"role": role, "content": text} for role, text in said.items() if text]
        asked = {
            "model": MODEL,
            "instructions": "\n".join(self._habits.system(self._system)),
            "input": self._history,
            "tools": self._tools,
            "max_output_tokens": MAX_TOKENS,
            "store": False,
        }
        answer = await _post(self._http, "/v1/responses", {**asked, **self._habits.fields})
        items, usage = answer["output"], answer["usage"]
        self.calls = [item for item in items if item["type"] == "function_call"]
        self._history += map(self._returned, filter(self._returns, items))
        cached = usage["input_tokens_details"]["cached_tokens"]
        return Counts(usage["input_tokens"], cached, usage["output_tokens"], len(self.calls), usage.get("astraea", {}))

    def _returns(self, item: Mapping[str, Any]) -> bool:
        return self._habits.returns_thoughts or item["type"] != "reasoning"

    def _returned(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {**item, "arguments": self._habits.printed(item["arguments"])} if "arguments" in item else {**item}


class TextAgent:
    """Speaks text over gRPC: it renders its chats itself, and puts what it is told behind its prompt as it is."""

    def __init__(self, channel: grpc.aio.Channel, tokenizer: Tokenizer, system: str, tools: Sequence[Any], stop: str):
        self._tokenizer, self._stop = tokenizer, stop
        self._first, self._tools = {"role": "system", "content": system}, tools
        self._text = ""
        self._decode = channel.unary_stream(
            f"/{wire.ORCHESTRATOR}/Decode",
            request_serializer=wire.DecodeRequest.SerializeToString,
            response_deserializer=wire.DecodeResponse.FromString,
        )

    async def ask(self, news: News) -> Counts:
        messages = [{"role": "tool", "content": result} for result in news.results]
        said = {"user": news.reminder or news.question, "system": news.notice}
        messages += [{"role": role, "content": text} for role, text in said.items() if text]
        if not self._text:
            self._text = self._tokenizer.render([self._first, *messages], self._tools)
        else:  # behind an empty turn, the template writes what follows any
            before = [self._first, {"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
            rendered = self._tokenizer.render([*before, *messages], self._tools)
            self._text += rendered[len(self._tokenizer.render(before, self._tools, add_generation_prompt=False)) :]
        request = wire.DecodeRequest(max_tokens=MAX_TOKENS, has_bos=True)
        request.text_content.text = self._text
        call = self._decode(request)
        answer = "".join([response.stream_content.samples[0].text async for response in call])
        usage, _ = read_usage(await call.trailing_metadata() or ())
        assert usage is not None, "the server has sent no usage"
        self._text += f"{answer}{self._stop}\n"
        return Counts(usage.prompt_tokens, usage.cached_tokens, usage.output_tokens, answer.count("<tool_call>"), {})


async def _post(http: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    response = await http.post(path, json={**body, **NO_SAMPLING})
    if response.is_error:
        raise RuntimeError(f"{path}: {response.status_code} {response.text[:300]}")
    answer: dict[str, Any] = response.json()
    return answer


def _arguments(call: Mapping[str, Any]) -> str:
    text: str = call["function"]["arguments"]
    return text
