"""Requests of Anthropic's Messages API, as far as a server of text models reads them.

Fields and betas that are not named here are accepted and ignored, since clients such as Claude Code send new ones with
every release (``context_management``, ``betas``, ``service_tier`` …). ``thread`` is named to be
refused: the messages beside it are not the whole conversation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from astraea_jax.engine.sampling import MAX_STOP_CHARS, MAX_STOPS
from astraea_jax.frontends.hint_fields import CacheControl
from astraea_jax.frontends.http.agent_fields import AgentFields
from astraea_jax.frontends.http.wire_model import WireModel

MAX_MESSAGES = 16_384
MAX_BLOCKS = 10_000
MAX_TOOLS = 1_024
MAX_NAME = 256
LARGEST = 2**31 - 1


def _as_blocks(content: Any) -> Any:
    """Return a text as the one block it is short for, and anything else as it is."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Cacheable(WireModel):
    """A part of a prompt, up to which the prompt may be used again."""

    cache_control: CacheControl | None = None


class TextBlock(Cacheable):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Cacheable):
    """A thought of an earlier reply. Its signature is not checked: thoughts of other servers are served too."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Cacheable):
    """A thought that only Anthropic's servers can read; it is left out."""

    type: Literal["redacted_thinking"]
    data: str = ""


class ToolUseBlock(Cacheable):
    """A call of an earlier reply."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=MAX_NAME)
    name: str = Field(min_length=1, max_length=MAX_NAME)
    input: dict[str, Any]


class ToolReference(WireModel):
    """The name of a tool that a search for tools has found."""

    type: Literal["tool_reference"]
    tool_name: str = Field(min_length=1, max_length=MAX_NAME)


ResultBlock = Annotated[TextBlock | ToolReference, Field(discriminator="type")]
ResultContent = Annotated[
    list[ResultBlock],
    Field(max_length=MAX_BLOCKS, fail_fast=True),
    BeforeValidator(_as_blocks, str | list[ResultBlock]),
]


class ToolResultBlock(Cacheable):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=MAX_NAME)
    content: ResultContent = Field(default_factory=list)
    is_error: bool = False


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
Content = Annotated[
    list[Block],
    Field(min_length=1, max_length=MAX_BLOCKS, fail_fast=True),
    BeforeValidator(_as_blocks, str | list[Block]),
]
SystemContent = Annotated[
    list[TextBlock],
    Field(max_length=MAX_BLOCKS, fail_fast=True),
    BeforeValidator(_as_blocks, str | list[TextBlock]),
]


class Message(WireModel):
    """One turn, or a part of one: neighbours of one role are one turn."""

    role: Literal["user", "assistant", "system"]
    content: Content


class Tool(Cacheable):
    """A function that the client runs."""

    name: str = Field(min_length=1, max_length=MAX_NAME)
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool = False


class AutoChoice(WireModel):
    """The model decides whether to call tools."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool = False


class AnyChoice(WireModel):
    """The model must call a tool."""

    type: Literal["any"]
    disable_parallel_tool_use: bool = False


class ToolChoice(WireModel):
    """The model must call this tool."""

    type: Literal["tool"]
    name: str = Field(min_length=1, max_length=MAX_NAME)
    disable_parallel_tool_use: bool = False


class NoChoice(WireModel):
    """The model must not call tools."""

    type: Literal["none"]


Choice = Annotated[AutoChoice | AnyChoice | ToolChoice | NoChoice, Field(discriminator="type")]


class Thinking(WireModel):
    """Whether the model thinks first, and in how many tokens, where it has tokens that begin and end its thoughts."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: int | None = Field(default=None, ge=0, le=LARGEST)


class OutputFormat(WireModel):
    """The JSON schema that the reply is to follow."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireModel):
    """The effort of thinking, and the form of the reply."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(WireModel):
    """Whom the client works for."""

    user_id: str | None = Field(default=None, max_length=4_096)


class CountRequest(WireModel, AgentFields):
    """A prompt whose tokens are counted."""

    model: str = Field(min_length=1, max_length=MAX_NAME)
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    system: SystemContent = Field(default_factory=list)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    thread: dict[str, Any] | None = None


StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class MessagesRequest(CountRequest):
    """A prompt and how to answer it."""

    max_tokens: int = Field(ge=1, le=LARGEST)
    stream: bool = False
    stop_sequences: list[StopSequence] = Field(default_factory=list, max_length=MAX_STOPS, fail_fast=True)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0, le=LARGEST)
    metadata: Metadata | None = None
