"""How models write tool calls, in each call format: what a grammar of calls puts around names and arguments."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from astraea_jax.engine.value_grammar import Notation
from astraea_jax.errors import RequestError, shown


@dataclass(frozen=True)
class CallSyntax:
    """The text around the calls of one turn.

    ``before`` and ``parameter`` hold ``{name}``, which stands for the name of the tool or of the parameter. Without
    ``parameter`` the arguments are one object. If ``parameter`` holds ``{string}``, it says ``true`` there before text
    and ``false`` before JSON.
    """

    before: str
    after: str
    trigger: str
    """How the first call begins, and so what other text may not hold."""
    begin: str = ""
    end: str = ""
    between: str | None = "\n"
    """None: a turn has one call."""
    parameter: str | None = None
    value_end: str = ""
    notation: Notation | None = None
    """How values are written, if not as JSON; then ``parameter`` is how an argument begins."""
    name: str = r"[^\n]+"
    """Pattern of names that can be written."""


_PYTHONIC = CallSyntax(
    "{name}(",
    ")",
    "[",
    parameter="{name}=",
    notation=Notation(
        ('"', '"'), (("True", "true"), ("False", "false"), ("None", "null")), comma=", ", colon=": ", escapes=True
    ),
    name=r"[A-Za-z_][A-Za-z0-9_]*(?:[-.][A-Za-z0-9_]+)*",
)
_HERMES = CallSyntax('<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", "<tool_call>")

SYNTAXES: dict[str, CallSyntax] = {
    "hermes": _HERMES,
    "json": _HERMES,
    "llama3_json": CallSyntax('{"name": "{name}", "parameters": ', "}", "{", between="; "),
    "mistral": CallSyntax(
        '{"name": "{name}", "arguments": ', "}", "[TOOL_CALLS]", begin="[TOOL_CALLS][", end="]", between=", "
    ),
    "mistral_args": CallSyntax("[TOOL_CALLS]{name}[ARGS]", "", "[TOOL_CALLS]", between=""),
    "harmony": CallSyntax(
        "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", "<|call|>", "", between=None
    ),
    "deepseek": CallSyntax(
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
        between="",
    ),
    "qwen3_coder": CallSyntax(
        "<tool_call>\n<function={name}>\n",
        "</function>\n</tool_call>",
        "<tool_call>",
        parameter="<parameter={name}>\n",
        value_end="\n</parameter>\n",
    ),
    "glm": CallSyntax(
        "<tool_call>{name}\n",
        "</tool_call>",
        "<tool_call>",
        parameter="<arg_key>{name}</arg_key>\n<arg_value>",
        value_end="</arg_value>\n",
    ),
    "gemma": CallSyntax(
        "<|tool_call>call:{name}",
        "<tool_call|>",
        "<|tool_call>",
        between="",
        notation=Notation(('<|"|>', '<|"|>'), (("true",), ("false",), ("null",)), comma=",", colon=":", bare_keys=True),
        name=r"[\w.-]{1,128}",
    ),
    "pythonic": replace(_PYTHONIC, begin="[", end="]", between=", "),
    "pythonic_tagged": replace(
        _PYTHONIC,
        trigger="<|python_start|>",
        begin="<|python_start|>[",
        end="]<|python_end|>",
        between=", ",
    ),
    "pythonic_lines": replace(
        _PYTHONIC,
        trigger="<function_calls>",
        begin="<function_calls>\n",
        end="\n</function_calls>",
    ),
    "deepseek_dsml": CallSyntax(
        '<｜DSML｜invoke name="{name}">\n',
        "</｜DSML｜invoke>\n",
        "<｜DSML｜function_calls>",
        begin="<｜DSML｜function_calls>\n",
        end="</｜DSML｜function_calls>",
        between="",
        parameter='<｜DSML｜parameter name="{name}" string="{string}">',
        value_end="</｜DSML｜parameter>\n",
        name=r'[^"\n]{1,128}',
    ),
}
"""Name of a call format, or of a way to write it, -> the syntax."""

WAYS = (
    ("mistral", "[ARGS]", "mistral_args"),
    ("deepseek", "｜DSML｜", "deepseek_dsml"),
    ("pythonic", "<|python_start|>", "pythonic_tagged"),
    ("pythonic", "<function_calls>", "pythonic_lines"),
)
"""Format, what a model that writes it in another way has among its tokens or in its chat template, and that way."""


def syntax_of(format: str, tokens: Collection[str], template: str) -> CallSyntax:
    """Return the syntax in which a model writes a format.

    Args:
        format: name of a call format.
        tokens: text of the model's control tokens.
        template: text of its chat template.

    Raises:
        RequestError: calls of the format cannot be written by a grammar.
    """
    ways = (way for base, sign, way in WAYS if base == format and (sign in tokens or sign in template))
    name = next(ways, format)
    if name not in SYNTAXES:
        raise RequestError(
            f"calls of the format {shown(format)} cannot be constrained; leave tool_choice at auto and out strict"
        )
    return SYNTAXES[name]
