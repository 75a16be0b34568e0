"""Writes a grammar of tool calls: in a model's own format, of the tools it has, with arguments by their schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from astraea_jax.engine.call_syntax import SYNTAXES, CallSyntax
from astraea_jax.engine.lark_text import TEXT, LarkText
from astraea_jax.engine.schema_limits import checked_schema
from astraea_jax.engine.value_grammar import TEXT_LIMITS, Notation, ValueGrammar, choices_of, enumerated
from astraea_jax.errors import RequestError, shown

__all__ = ["SYNTAXES", "calls_as_lark", "json_options"]

MAX_TOOLS = 128
MAX_CALLS = 64
"""Calls in one turn."""

MAX_NAME_CHARS = 256
MAX_CHARS = 262_144
"""Length of the grammar of all tools together."""


def calls_as_lark(
    tools: Sequence[Mapping[str, Any]],
    syntax: CallSyntax,
    text: LarkText,
    *,
    name: str | None,
    parallel: bool,
    required: bool,
) -> str:
    """Lark of a turn that calls tools.

    Args:
        tools: OpenAI-shaped. The arguments of a tool that is ``strict`` follow its whole schema; for others, what
            cannot be enforced is left out.
        syntax: how the model writes calls.
        text: knows the model's control tokens.
        name: the only tool that may be called; None: any.
        parallel: allow several calls.
        required: the turn is nothing but calls; otherwise it is text in which calls may stand.

    Raises:
        RequestError: a tool is not OpenAI-shaped, or its schema not served; there is no tool, or none of this name.
    """
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries; at most {MAX_TOOLS} can be constrained")
    functions = [_function(tool) for tool in tools]
    chosen = [function for function in functions if name is None or function["name"] == name]
    if not chosen:
        missing = "tools is empty" if name is None else f"tool_choice names {shown(name)}, which is not in tools"
        raise RequestError(f"{missing}; a call cannot be required")
    bodies = [_Call(function, syntax, text, f"call_{i}").lark() for i, function in enumerate(chosen)]
    calls = " | ".join(f"call_{i}" for i in range(len(bodies)))
    several = parallel and syntax.between is not None
    turn = _join(
        text.literal(syntax.begin),
        "call",
        f"({_join(text.literal(syntax.between or ''), 'call')}){{0,{MAX_CALLS - 1}}}" if several else "",
        text.literal(syntax.end),
    )
    start = f"start: {turn}\n" if required else _within_text(syntax, text, turn)
    lark = "".join([start, f"call: {calls}\n", *bodies, TEXT])
    if len(lark) > MAX_CHARS:
        raise RequestError(f"tools make a grammar of more than {MAX_CHARS} characters; constrain fewer of them")
    return lark


def _within_text(syntax: CallSyntax, text: LarkText, turn: str) -> str:
    """Lark of a turn that may hold calls: free text up to the trigger, from where on it must be calls."""
    if not syntax.trigger:
        raise RequestError("strict tools need a required tool_choice in this model's call format")
    if len(syntax.trigger) == 1:
        return f"start: {turn} | PLAIN?\nPLAIN: /[^\\{syntax.trigger}](?s:.*)/\n"
    if text.literal(syntax.trigger).startswith("<["):  # text cannot hold it anyway
        return f"start: TEXT ({turn} TEXT)?\n"
    raise RequestError(
        f"strict tools need a required tool_choice with this model, whose {syntax.trigger} is no token of its own"
    )


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The function of a tool, with a checked name and parameters that are the schema of an object."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"tools holds {shown(tool)}; tools are OpenAI-shaped functions")
    name = function.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise RequestError(f"a tool's name is {shown(name)}; it must be 1 to {MAX_NAME_CHARS} printable characters")
    parameters = checked_schema(function.get("parameters") or {"type": "object", "properties": {}})
    if parameters.setdefault("type", "object") != "object":
        raise RequestError(f"parameters of {shown(name)} are of type {shown(parameters['type'])}; it must be object")
    if "properties" in parameters and not isinstance(parameters["properties"], dict):
        raise RequestError(f"properties of {shown(name)} are {shown(parameters['properties'])}; it must be an object")
    if "properties" in parameters:  # a call with further arguments would fail in the tool
        parameters.setdefault("additionalProperties", False)
    return {"name": name, "parameters": parameters, "strict": function.get("strict") is True}


class _Call:
    """Writes the rule of one tool's calls.

    Args:
        function: as :func:`_function` returns it.
        syntax: how the model writes calls.
        text: knows the model's control tokens.
        rule: its name; further rules begin with it.
    """

    def __init__(self, function: Mapping[str, Any], syntax: CallSyntax, text: LarkText, rule: str):
        self._name: str = function["name"]
        self._parameters: dict[str, Any] = function["parameters"]
        self._strict: bool = function["strict"]
        self._syntax = syntax
        self._text = text
        self._rule = rule

    def lark(self) -> str:
        """Lark of the rule, and of the rules that it uses."""
        quoted = '"{name}"' in self._syntax.before  # a JSON string
        name = json.dumps(self._name, ensure_ascii=False)[1:-1] if quoted else self._name
        if self._text.literal(name) != json.dumps(name):
            raise RequestError(f"a tool's name is {shown(self._name)}, which is a control token of the model")
        if not re.fullmatch(self._syntax.name, name):
            raise self._unwritable(self._name)
        before = self._text.literal(self._syntax.before.replace("{name}", name))
        arguments, rules = self._arguments()
        return f"{self._rule}: {_join(before, arguments, self._text.literal(self._syntax.after))}\n{rules}"

    def _arguments(self) -> tuple[str, str]:
        """Lark of the arguments, and the rules that they use."""
        if self._syntax.notation is not None:
            return self._in_notation(self._syntax.notation)
        return (self._json(self._parameters), "") if self._syntax.parameter is None else self._tagged()

    def _in_notation(self, notation: Notation) -> tuple[str, str]:
        values = ValueGrammar(notation, self._text, self._parameters, self._rule, strict=self._strict)
        if self._syntax.parameter is None:
            arguments = values.object_of({"properties": {}, **self._parameters})
            return arguments, "".join(values.rules)
        pairs: list[tuple[str, str]] = []
        for name, schema in self._parameters.get("properties", {}).items():
            if not re.fullmatch(self._syntax.name, name):
                raise self._unwritable(name)
            begin = self._text.literal(self._syntax.parameter.replace("{name}", name))
            pairs.append((name, f"{begin} {values.value(schema)}"))
        return values.sequence(pairs, self._parameters.get("required")), "".join(values.rules)

    def _unwritable(self, name: str) -> RequestError:
        return RequestError(f"the name {shown(name)} cannot be written in this model's call format")

    def _json(self, schema: Mapping[str, Any]) -> str:
        return f"%json {json.dumps(json_options(schema, lenient=not self._strict))}"

    def _tagged(self) -> tuple[str, str]:
        """Lark of arguments that stand between tags, in the order of the schema, and the rules of each."""
        properties = self._parameters.get("properties", {})
        required = self._parameters.get("required", [])
        references: list[str] = []
        rules: list[str] = []
        for i, (name, schema) in enumerate(properties.items()):
            rule = f"{self._rule}_{i}"
            values = self._values(rule, name, schema)
            rules.append(f"{rule}: {' | '.join(value for value, _ in values)}\n")
            rules += [definitions for _, definitions in values]
            references.append(rule if name in required else f"{rule}?")
        return " ".join(references), "".join(rules)

    def _values(self, rule: str, name: str, schema: Any) -> list[tuple[str, str]]:
        """Lark of an argument, once as text and once as JSON as far as it may be either, and what each needs.

        Text stands there as it is, everything else as JSON. Where the tags do not tell which it is, any text is
        allowed if some is, since what is read as JSON, such as null, is text, too.
        """
        parameter = (self._syntax.parameter or "").replace("{name}", name)
        listed, others, free = self._alternatives(schema)
        end = self._text.literal(self._syntax.value_end)
        as_text, as_json = (self._text.literal(parameter.replace("{string}", told)) for told in ("true", "false"))
        values: list[tuple[str, str]] = []
        if free:
            value, definitions = self._text.until(f"{rule}_value", self._syntax.value_end)
            values.append((f"{as_text} {value}", definitions))
        if free and as_text == as_json:
            return values
        if listed and not free:
            values.append((f"{as_text} ({' | '.join(listed)}) {end}", ""))
        return [*values, (f"{as_json} ({' | '.join(others)}) {end}", "")] if others else values

    def _alternatives(self, schema: Any) -> tuple[list[str], list[str], bool]:
        """The texts that an argument may be, Lark of what else it may be, and whether it may be any text."""
        listed: list[str] = []
        others: list[str] = []
        free = False
        for choice in choices_of(schema, self._parameters):
            if (values := enumerated(choice)) is not None:
                listed += [json.dumps(value) for value in values if isinstance(value, str)]
                others += [json.dumps(json.dumps(value)) for value in values if not isinstance(value, str)]
            elif choice.get("type", "string") == "string" and not choice.keys() & _COMBINED:
                self._check_text(choice)
                free = True
                others += [] if "type" in choice else [self._json({"type": _NO_TEXT})]
            else:
                shared: dict[str, Any] = {
                    key: self._parameters[key] for key in ("$defs", "definitions") if key in self._parameters
                }
                others.append(self._json({**shared, **choice}))
        return listed, others, free

    def _check_text(self, schema: Mapping[str, Any]) -> None:
        if self._strict and (beyond := schema.keys() & TEXT_LIMITS):
            raise RequestError(
                f"{sorted(beyond)[0]} in the strict tool {shown(self._name)} cannot be enforced in this model's "
                "call format; leave out strict"
            )


_NO_TEXT = ["number", "boolean", "null", "array", "object"]
_COMBINED = {"$ref", "anyOf", "oneOf", "allOf"}


def json_options(schema: Mapping[str, Any], *, lenient: bool) -> dict[str, Any]:
    """The schema with the compiler's options in it, which replace those of whoever wrote it.

    White space is bounded, because a model that likes it would write nothing else. ``lenient`` leaves out what is not
    supported.
    """
    return {**schema, "x-guidance": {"whitespace_pattern": r"[ \n\r\t]{1,64}", "lenient": lenient}}


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
