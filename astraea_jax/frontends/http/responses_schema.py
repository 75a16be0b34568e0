"""Requests of OpenAI's Responses API (Open Responses' core), as far as a server of text models reads them.

Fields that are not named here are accepted and ignored (``prompt_cache_key``, ``service_tier``, ``include`` …).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from astraea_jax.frontends.http.wire_model import WireModel, few

MAX_ITEMS = 16_384
MAX_PARTS = 10_000
MAX_TOOLS = 1_024
MAX_NAME = 256
LARGEST = 2**31 - 1

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class TextPart(WireModel):
    """A piece of text, whatever it is called where it stands."""

    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class RefusalPart(WireModel):
    """A model's refusal to answer."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    """Return a text as the one part it is short for, and anything else as it is."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True), BeforeValidator(_as_parts, str | list[Part])]


class IdentifiedItem(WireModel):
    """An item that may bring an id, as those of earlier responses do."""

    id: Annotated[str, Field(max_length=MAX_NAME)] = ""


class MessageItem(IdentifiedItem):
    """A message of one party."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts


class ReasoningItem(IdentifiedItem):
    """A thought of an earlier response. One that only another server can read (``encrypted_content``) is left out."""

    type: Literal["reasoning"]
    summary: Parts = Field(default_factory=list)
    content: Parts = Field(default_factory=list)


class CallItem(IdentifiedItem):
    """A call of an earlier response."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str


class CallOutputItem(IdentifiedItem):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Parts


class ItemReference(WireModel):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: Name


def _type_of(item: Any) -> Any:
    """Type of an input item; a message may leave it out, and so may a reference, which has nothing but an id."""
    if not isinstance(item, dict):
        return getattr(item, "type", None)
    return item.get("type") or ("item_reference" if item.keys() <= {"id", "type"} else "message")


Item = Annotated[MessageItem | ReasoningItem | CallItem | CallOutputItem, Field(discriminator="type")]
"""An item that says something."""

InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(
        _type_of,
        custom_error_type="unserved_item",
        custom_error_message=(
            "this server reads items of type message, reasoning, function_call, function_call_output and item_reference"
        ),
    ),
]


def _as_items(given: Any) -> Any:
    """Return a text as the one message it is short for, and anything else as it is."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class FunctionTool(WireModel):
    """A function that the client runs."""

    type: Literal["function"]
    name: Name
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class HostedTool(WireModel):
    """A tool that OpenAI's servers would run. Models here are not told of it."""

    type: Annotated[str, Field(max_length=MAX_NAME)]


Tool = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[HostedTool, Tag("hosted")],
    Discriminator(lambda tool: "function" if _type_of(tool) == "function" else "hosted"),
]


class NamedTool(WireModel):
    """A tool that the model must, or may, call."""

    type: Literal["function"]
    name: Name


class AllowedTools(WireModel):
    """The tools among which the model may, or must, choose."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)


ToolChoice = Literal["auto", "none", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]


class TextFormat(WireModel):
    """Plain text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(WireModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    name: Name = "response"
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class TextConfig(WireModel):
    """The form of the reply."""

    format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] = TextFormat(type="text")


class Reasoning(WireModel):
    """The effort of thinking. A summary is accepted, but thoughts come as they are."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


def _short_pairs(metadata: dict[str, str]) -> dict[str, str]:
    if any(len(key) > 64 or len(value) > 512 for key, value in metadata.items()):
        raise ValueError("keys have at most 64 characters, and values 512")
    return metadata


class ResponsesRequest(WireModel):
    """Input items and how to answer them."""

    model: Name
    input: Annotated[
        list[InputItem], Field(max_length=MAX_ITEMS, fail_fast=True), BeforeValidator(_as_items, str | list[InputItem])
    ] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: Name | None = None
    store: bool = True
    stream: bool = False
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    reasoning: Reasoning = Reasoning()
    max_output_tokens: int | None = Field(default=None, ge=1, le=LARGEST)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, allow_inf_nan=False)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[Name] = Field(default_factory=list, max_length=64, fail_fast=True)
    metadata: Annotated[dict[str, str], few(16), AfterValidator(_short_pairs)] = Field(default_factory=dict)
    prompt_cache_key: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    background: bool = False
    conversation: None = None

    @model_validator(mode="after")
    def _background_is_stored(self) -> Self:
        if self.background and not self.store:
            raise ValueError("a background response must be stored: leave store out, or make it true")
        return self
