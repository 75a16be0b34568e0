"""From a request of Anthropic's Messages API to a chat as every front door has it: messages in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.messages_schema import (
    AnyChoice,
    Block,
    CountRequest,
    Message,
    NoChoice,
    TextBlock,
    Tool,
    ToolChoice,
    ToolResultBlock,
)

BILLING = "x-anthropic-billing-header:"
"""Begins a line that Claude Code writes into the system prompt. Its hash differs in each request, so with it no request
would find the KV of the one before."""

EFFORTS = {"xhigh": "high", "max": "high"}
"""Efforts that chat templates do not know -> the next one that they do."""


def chat_messages(request: CountRequest, *, keep_billing: bool = False) -> list[dict[str, Any]]:
    """Return the conversation in OpenAI's shape, without Claude Code's billing header unless it is to be kept.

    Raises:
        RequestError: blocks stand where they cannot, or a result belongs to no call.
    """
    texts = [block.text if keep_billing else _without_billing(block.text) for block in request.system]
    system = "\n".join(texts).strip()
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    names: dict[str, str] = {}  # of the calls so far, by id
    for i, role, blocks in _turns(request.messages):
        if role == "assistant":
            messages.append(_assistant(blocks, names, f"messages.{i}"))
        elif role == "system":
            messages.append({"role": "system", "content": _text(blocks, f"messages.{i}")})
        else:
            messages += _user(blocks, names, f"messages.{i}")
    return messages


def chat_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the tools in OpenAI's shape."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": {"type": "object", "properties": {}} | tool.input_schema,
                **({"strict": True} if tool.strict else {}),
            },
        }
        for tool in tools
    ]


def tool_choice(request: CountRequest) -> str:
    """Return ``"auto"``, ``"none"``, ``"required"`` or the name of the tool that must be called."""
    match request.tool_choice:
        case NoChoice():
            return "none"
        case AnyChoice():
            return "required"
        case ToolChoice(name=name):
            return name
    return "auto"


def parallel_calls(request: CountRequest) -> bool:
    """Return whether a reply may hold several calls."""
    return not getattr(request.tool_choice, "disable_parallel_tool_use", False)


def constraint(request: CountRequest) -> dict[str, Any] | None:
    """Return the schema that the reply is to follow, as ``ChatRequest`` has it."""
    config = request.output_config
    if config is None or config.format is None:
        return None
    return {"type": "json_schema", "schema": config.format.json_schema}


def template_arguments(request: CountRequest) -> dict[str, Any]:
    """Return whether and how much the model thinks, as arguments of chat templates.

    Without ``thinking`` there is none, as the API has it: clients then expect text in the first block.
    """
    thinks = request.thinking is not None and request.thinking.type != "disabled"
    effort = request.output_config.effort if request.output_config is not None else None
    return {"enable_thinking": thinks} | ({"reasoning_effort": EFFORTS.get(effort, effort)} if effort else {})


def lifetimes(request: CountRequest) -> Iterator[str]:
    """Yield the lifetimes that the client gives to parts of its prompt in the cache."""
    blocks = (block for message in request.messages for block in message.content)
    for part in (*request.system, *request.tools, *blocks):
        if part.cache_control is not None and part.cache_control.ttl is not None:
            yield part.cache_control.ttl


def _without_billing(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.startswith(BILLING)) if BILLING in text else text


def _turns(messages: Sequence[Message]) -> Iterator[tuple[int, str, list[Block]]]:
    """Yield the turns: neighbours of one role are one, with the place of the first."""
    for role, turn in groupby(enumerate(messages), key=lambda placed: placed[1].role):
        (first, message), *rest = turn
        yield first, role, [*message.content, *(block for _, later in rest for block in later.content)]


def _assistant(blocks: Sequence[Block], names: dict[str, str], where: str) -> dict[str, Any]:
    said, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for block in blocks:
        match block.type:
            case "text":
                said.append(block.text)
            case "thinking":
                thoughts.append(block.thinking)
            case "tool_use":
                names[block.id] = block.name
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            case "tool_result":
                raise RequestError(f"{where}: a tool_result must stand in a message of the user")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(said)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(blocks: Sequence[Block], names: dict[str, str], where: str) -> Iterator[dict[str, Any]]:
    """Yield a message for each result, and one for the text between results."""
    texts: list[Block] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in names:
                raise RequestError(f"{where}: a tool_result belongs to no tool_use with id {block.tool_use_id!r}")
            if texts:
                yield {"role": "user", "content": _text(texts, where)}
                texts = []
            result = {"role": "tool", "tool_call_id": block.tool_use_id, "name": names[block.tool_use_id]}
            yield result | {"content": _result(block)}
        else:
            texts.append(block)
    if texts:
        yield {"role": "user", "content": _text(texts, where)}


def _result(block: ToolResultBlock) -> str:
    text = "\n".join(
        part.text if isinstance(part, TextBlock) else f"The tool {part.tool_name} can be called."
        for part in block.content
    )
    return f"Error: {text}" if block.is_error else text


def _text(blocks: Sequence[Block], where: str) -> str:
    for block in blocks:
        if not isinstance(block, TextBlock):
            raise RequestError(f"{where}: a {block.type} block must stand in a message of the assistant")
    return "\n".join(block.text for block in blocks if isinstance(block, TextBlock))
