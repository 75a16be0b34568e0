"""The body of ``/v1/chat/completions``, and what it asks for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from astraea_jax.engine.sampling import MAX_LOGPROBS
from astraea_jax.errors import RequestError
from astraea_jax.frontends.http.sampling_schema import LARGE, Model, Name, SamplingFields, Text

MAX_MESSAGES = 16_384
MAX_PARTS = 4096
MAX_TOOLS = 1024
TEMPLATE_ARGUMENTS = ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget")
"""Variables of chat templates that a client may set; others could change what a template is for."""

ToolName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[\w.:/-]+$")]


class ContentPart(Model):
    """A part of a message's content. Text is served, and nothing else."""

    type: Annotated[str, StringConstraints(max_length=64)]
    text: Text | None = None


class CalledFunction(Model):
    """The function of a call."""

    name: Name
    arguments: Text | dict[str, Any] | None = None


class MessageCall(Model):
    """A call in an assistant's message."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Model):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[MessageCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: Name | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None

    def plain(self) -> dict[str, Any]:
        """Return it in the shape that chat templates expect."""
        message = self.model_dump(exclude_none=True)
        if self.role == "developer":
            message["role"] = "system"  # few templates know the newer name
        if not self.tool_calls:
            message.pop("tool_calls", None)
        return {"content": "", **message}


class Function(Model):
    """A function that the model may call."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def plain(self) -> dict[str, Any]:
        """Return it in the shape that chat templates expect."""
        parameters = {"type": "object", "properties": {}, **(self.parameters or {})}
        strict = {"strict": True} if self.strict else {}
        return {"name": self.name, "description": self.description or "", "parameters": parameters, **strict}


class Tool(Model):
    """A tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Model):
    """The name of a function."""

    name: ToolName


class NamedTool(Model):
    """The choice of one tool."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Model):
    """A schema that the answer must follow."""

    name: Name = "answer"
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Model):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def constraint(self) -> dict[str, Any] | None:
        """Return the constraint of :class:`.turns.Request`.

        Raises:
            RequestError: the schema is missing.
        """
        if self.type == "json_schema":
            if self.json_schema is None:
                raise RequestError("response_format of type json_schema needs a json_schema with a schema")
            return {"type": "json_schema", "schema": self.json_schema.schema_}
        return {"type": self.type} if self.type == "json_object" else None


class ChatCompletionRequest(SamplingFields):
    """The body."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=LARGE)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=LARGE)] | None = None
    reasoning_effort: Annotated[str, StringConstraints(max_length=32)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=LARGE)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    continue_final_message: bool | None = None
    functions: Annotated[list[Any], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    modalities: Annotated[list[Name], Field(max_length=8, fail_fast=True)] | None = None

    def constraint(self) -> dict[str, Any] | None:
        """Return the constraint of :class:`.turns.Request`.

        Raises:
            RequestError: it is given twice.
        """
        given = [part.constraint() for part in (self.response_format, self.structured_outputs) if part is not None]
        given = [constraint for constraint in given if constraint is not None]
        if len(given) > 1:
            raise RequestError("response_format and structured_outputs exclude each other")
        return given[0] if given else None

    def choice(self) -> str:
        """Return the ``tool_choice`` of :class:`.turns.ChatRequest`.

        Raises:
            RequestError: a tool with one of the words for a name is chosen.
        """
        if not isinstance(self.tool_choice, NamedTool):
            return self.tool_choice or "auto"
        name = self.tool_choice.function.name
        if name in ("auto", "none", "required"):
            raise RequestError(f"a tool called {name!r} cannot be chosen by its name; give it another one")
        return name

    def template_arguments(self) -> dict[str, Any]:
        """Variables for the chat template.

        Raises:
            RequestError: one may not be set, or is no plain value.
        """
        arguments: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            arguments["reasoning_effort"] = self.reasoning_effort
            if self.reasoning_effort == "none":
                arguments["enable_thinking"] = False
        for name, value in (self.chat_template_kwargs or {}).items():
            if name not in TEMPLATE_ARGUMENTS:
                raise RequestError(
                    f"chat_template_kwargs may hold {', '.join(TEMPLATE_ARGUMENTS)}, but not {name[:60]!r}"
                )
            if not isinstance(value, bool | int | str) or len(str(value)) > 64:
                raise RequestError(f"chat_template_kwargs.{name} must be true or false, a number or a word")
            arguments[name] = value
        return arguments

    def refuse_unserved(self) -> None:
        """Refuse what is known and not served.

        Raises:
            RequestError: there is such a field.
        """
        if self.continue_final_message:
            raise RequestError("continue_final_message (prefill) is not served: end with a message of the user")
        if self.functions:
            raise RequestError("functions has been replaced by tools, which are served")
        if self.modalities and self.modalities != ["text"]:
            raise RequestError("modalities holds more than text, which is all that is served")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true")
