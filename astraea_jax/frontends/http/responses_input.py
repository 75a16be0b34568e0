"""From a request of OpenAI's Responses API to a chat as every front door has it, in Chat Completions' shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.responses_schema import (
    AllowedTools,
    CallItem,
    CallOutputItem,
    FunctionTool,
    Item,
    MessageItem,
    NamedTool,
    Parts,
    ReasoningItem,
    ResponsesRequest,
    SchemaFormat,
    TextPart,
)

EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts that chat templates do not know -> the next one that they do."""

Message = dict[str, Any]


def conversation(items: Sequence[Item], before: Sequence[Message] = ()) -> list[Message]:
    """Return the messages that input items make, without those of the responses before.

    What a model has thought, said and called without anything between is one message of the assistant.

    Args:
        items: the request's input.
        before: messages up to there; they name the calls that results may belong to.

    Raises:
        RequestError: a result belongs to no call.
    """
    names = {call["id"]: call["function"]["name"] for message in before for call in message.get("tool_calls", ())}
    messages: list[Message] = []
    turn: Message | None = None  # of the assistant, to which the next item may add
    for i, item in enumerate(items):
        if isinstance(item, ReasoningItem | CallItem) or (isinstance(item, MessageItem) and item.role == "assistant"):
            if turn is None:
                turn = {"role": "assistant", "content": []}
                messages.append(turn)
            _extend(turn, item)
            if isinstance(item, CallItem):
                names[item.call_id] = item.name
            continue
        turn = None
        if isinstance(item, CallOutputItem):
            if item.call_id not in names:
                raise RequestError(f"input.{i}: a function_call_output belongs to no function_call {item.call_id!r}")
            result = {"role": "tool", "tool_call_id": item.call_id, "name": names[item.call_id]}
            messages.append(result | {"content": _text(item.output)})
        else:
            role = "user" if item.role == "user" else "system"
            messages.append({"role": role, "content": _text(item.content)})
    for message in messages:
        for field in ("content", "reasoning_content"):
            if isinstance(pieces := message.get(field), list):
                message[field] = "".join(pieces)
    return messages


def with_instructions(instructions: str | None, messages: Sequence[Message]) -> list[Message]:
    """Return ``messages`` behind one system message: the instructions, and what the first messages tell the model.

    Chat templates know one system message, at the beginning.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    texts = [text for text in (instructions, *(message["content"] for message in messages[:first])) if text]
    system = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    return [*system, *messages[first:]]


def chosen_tools(request: ResponsesRequest) -> tuple[list[FunctionTool], str]:
    """Return the tools that the model may call, and ``"auto"``, ``"none"``, ``"required"`` or the one it must call.

    Raises:
        RequestError: ``tool_choice`` allows what is no function of the request.
    """
    tools = [tool for tool in request.tools if isinstance(tool, FunctionTool)]
    match request.tool_choice:
        case NamedTool(name=name):
            return tools, name
        case AllowedTools(mode=mode, tools=named):
            allowed = {tool.name for tool in named}
            if unknown := sorted(allowed - {tool.name for tool in tools}):
                raise RequestError(f"tool_choice allows {unknown[0]!r}, which is no function among the tools")
            return [tool for tool in tools if tool.name in allowed], mode
        case choice:
            return tools, choice


def chat_tools(tools: Iterable[FunctionTool]) -> list[dict[str, Any]]:
    """Return tools in Chat Completions' shape."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": {"type": "object", "properties": {}} | tool.parameters,
                **({"strict": True} if tool.strict else {}),
            },
        }
        for tool in tools
    ]


def constraint(request: ResponsesRequest) -> dict[str, Any] | None:
    """Return the form of the reply as ``ChatRequest`` has it; None: plain text."""
    match request.text.format:
        case SchemaFormat(json_schema=schema):
            return {"type": "json_schema", "schema": schema}
        case plain:
            return None if plain.type == "text" else {"type": plain.type}


def template_arguments(request: ResponsesRequest) -> dict[str, Any]:
    """Return whether and how much the model thinks, as arguments of chat templates; none: as the model does."""
    match request.reasoning.effort:
        case None:
            return {}
        case "none":
            return {"enable_thinking": False}
        case effort:
            return {"enable_thinking": True, "reasoning_effort": EFFORTS.get(effort, effort)}


def _extend(turn: Message, item: MessageItem | ReasoningItem | CallItem) -> None:
    match item:
        case MessageItem():
            turn["content"].append(_text(item.content))
        case ReasoningItem():
            if thought := _text(item.content or item.summary):
                turn.setdefault("reasoning_content", []).append(thought)
        case CallItem():
            function = {"name": item.name, "arguments": item.arguments}
            turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _text(parts: Parts) -> str:
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in parts)
