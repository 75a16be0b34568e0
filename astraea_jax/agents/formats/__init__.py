"""Formats in which models write their thoughts and tool calls, and which of them a model uses.

Each is a file of JSON beside this module: a ``response_template`` as transformers defines it, and what
:class:`CallFormat` has besides. A field's name up to a dot says what it is: ``tool_calls``,
``thinking``, ``content``, or ``markup``, which may follow calls and means nothing. ``tool_calls`` with ``xml-inline``
content say in ``content_args`` what begins and ends a value.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import regex

from astraea_jax.agents.regions import Splitting
from astraea_jax.agents.response_templates import ResponseTemplateField, load_response_template
from astraea_jax.engine.lark_text import Thought
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.tokenizer import Tokenizer

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
DEFAULT = "json"
"""Reads every tag that stands before JSON."""

SIGNS = (
    ("<|channel|>", "harmony"),
    ("<|tool_call>", "gemma"),
    ("<function=", "qwen3_coder"),
    ("<arg_key>", "glm"),
    ("<｜DSML｜", "deepseek"),
    ("<｜tool▁call▁begin｜>", "deepseek"),
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("<|python_start|>", "pythonic"),
    ("<function_calls>", "pythonic"),
    ("<|start_header_id|>", "llama3_json"),
)
"""Text in a model's chat template -> its format; the first one found counts."""

DRAFT_TAGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<scratch_pad>": "</scratch_pad>",
    "<scratchpad>": "</scratchpad>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "[think]": "[/think]",
}
"""Opening tag of a thought -> closing tag, in lower case; models write them in any. Calls in between are drafts."""

PROMPT_END = 16_384
"""Characters of a prompt's end in which the beginning of the turn is looked for."""

Kind = Literal["thinking", "draft", "tool_calls", "markup", "content"]


@dataclass(frozen=True)
class CallFormat:
    """One format.

    Args:
        name: of its file, or ``"response_template"`` if the tokenizer has its own.
        fields: regions of a turn, as transformers reads their specifications.
        split: splits a turn into these regions.
        thoughts_only: ``split`` without calls.
        anchor: pattern of what begins a turn in a prompt.
        bare: content parser of calls without markup, if the model writes such.
        thoughts: how the model begins and ends a thought, literally; the most usual way comes first.
        answer: what may stand before the text for the user.
        call_id_length: letters and digits of a call's id, if the chat template takes no other ids.
        thoughts_apart: the chat template refuses thoughts within the content of a message.
    """

    name: str
    fields: Mapping[str, ResponseTemplateField]
    split: Splitting
    thoughts_only: Splitting
    anchor: Any
    bare: str | None = None
    thoughts: tuple[tuple[str, str], ...] = ()
    answer: str = ""
    call_id_length: int | None = None
    thoughts_apart: bool = False

    def call_id(self, number: int) -> str:
        """Return an id for the call of this number in a conversation."""
        return f"call_{number}" if self.call_id_length is None else f"call{number:0{self.call_id_length - 4}}"

    def thought(self, prompt: str, tokens: Collection[str]) -> Thought | None:
        """Return the thought that a turn may begin with, for grammars; None: the model does not think.

        Args:
            prompt: its end.
            tokens: text of the tokenizer's added tokens.
        """
        begun = self.begun(prompt)
        for begin, end in self.thoughts:
            if begun.rfind(begin) > begun.rfind(end):
                return Thought(begin, end, opened=True)
        known = (Thought(*tags) for tags in self.thoughts if any(tags[0].startswith(token) for token in tokens))
        return next(known, None)

    def begun(self, prompt: str) -> str:
        """Return the part of the turn that the prompt has already written, such as ``<think>``."""
        tail = prompt[-PROMPT_END:]
        if anchors := list(self.anchor.finditer(tail)):
            return tail[anchors[-1].end() :]
        openings = [field.open_re.pattern for field in self.fields.values() if field.open_re]
        opened = (regex.search(rf"(?:{pattern})\s*\Z", tail) for pattern in openings)
        return next((found[0] for found in opened if found), "")


def kind(field: str) -> Kind:
    """Return the kind of a field."""
    stem = field.partition(".")[0]
    if stem in ("reasoning_content", "reasoning"):
        return "thinking"
    return stem if stem in ("thinking", "draft", "tool_calls", "markup") else "content"  # type: ignore[return-value]


def choose(tokenizer: Tokenizer, name: str | None = None) -> CallFormat:
    """Return the format ``name``; else the ``response_template`` of the tokenizer; else what the chat template shows.

    Raises:
        ValueError: there is no format of this name.
        CheckpointError: the tokenizer's ``response_template`` is damaged.
    """
    if name is not None:
        return named(name)
    if tokenizer.response_template is not None:
        try:
            return _format("response_template", {"response_template": tokenizer.response_template})
        except Exception as error:  # whatever a stranger's file leads to
            raise CheckpointError(f"the tokenizer's response_template is damaged: {error}") from error
    return named(next((name for sign, name in SIGNS if sign in tokenizer.template_text), DEFAULT))


@functools.cache
def named(name: str) -> CallFormat:
    """Return the format of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in NAMES:
        raise ValueError(f"there is no call format {name!r}; there are: {', '.join(NAMES)}")
    return _format(name, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def _format(name: str, data: Mapping[str, Any]) -> CallFormat:
    whole = load_response_template(data["response_template"])
    fields = dict(data["response_template"]["fields"])
    implicit = dict(fields.get(whole.implicit, {}))
    closing = {key: implicit.pop(key) for key in ("close", "close_pattern") if key in implicit}
    if closing:  # is markup: nothing is lost with it, and nothing else begins behind it
        fields["content.end"] = {key.replace("close", "open"): value for key, value in closing.items()}
        fields["content.end"]["close_pattern"] = ""
    fields[whole.implicit or "content.rest"] = implicit
    known = [field.open_re for field in whole.fields.values() if field.open_re]
    for number, (begin, end) in enumerate(DRAFT_TAGS.items()):
        if not any(pattern.match(begin) for pattern in known):
            fields[f"draft.{number}"] = {"open_pattern": _any_case(begin), "close_pattern": _any_case(end)}
    thoughts = {key: field for key, field in fields.items() if kind(key) != "tool_calls"}
    return CallFormat(
        name=name,
        fields=load_response_template({**data["response_template"], "fields": fields}).fields,
        split=_splitting(fields),
        thoughts_only=_splitting(thoughts),
        anchor=whole.start_anchor_re,
        bare=data.get("bare"),
        thoughts=tuple((begin, end) for begin, end in data.get("thoughts", _literal_thoughts(fields))),
        answer=data.get("answer", ""),
        call_id_length=data.get("call_id_length"),
        thoughts_apart=data.get("thoughts_apart", False),
    )


def _literal_thoughts(fields: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return how thoughts begin and end in a template that says it without patterns."""
    tags = [(field.get("open"), field.get("close")) for name, field in fields.items() if kind(name) == "thinking"]
    return [(begin, end) for begin, end in tags if isinstance(begin, str) and isinstance(end, str)]


def _splitting(fields: Mapping[str, Mapping[str, Any]]) -> Splitting:
    """Make the template that splits turns; closing tags of calls do not split, since they may stand in strings."""
    return Splitting(
        {
            name: {key: value for key, value in form.items() if kind(name) != "tool_calls" or key.startswith("open")}
            for name, form in fields.items()
        }
    )


def _any_case(tag: str) -> str:
    return "".join(f"[{char}{char.upper()}]" if char.isalpha() else regex.escape(char) for char in tag)
