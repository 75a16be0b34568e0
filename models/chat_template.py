"""Chat templates of Hugging Face folders: found, compiled in Jinja's sandbox, rendered as transformers 5 does."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from .config import CheckpointError
from .config_file import read_json, read_text

FILE = "chat_template.jinja"
NAMED_FILES = "additional_chat_templates"
"""Subfolder with one file for each further template."""
LEGACY_FILE = "chat_template.json"
"""File in which processors of older releases kept the template."""

PROBES = ("first-part", "second-part")
WRITTEN_AS_DATA = re.compile(r"""['"]text['"]\s*:""")
"""A list of content parts that was printed instead of read."""


class ChatTemplate:
    """One Jinja template.

    Args:
        text: its source.

    Raises:
        CheckpointError: it is no valid template.
    """

    def __init__(self, text: str):
        environment = _environment()
        try:
            nodes = environment.parse(text)
            self._template = environment.from_string(text)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            raise CheckpointError(f"the chat template is damaged: {error}") from error
        data = [node.data for node in nodes.find_all(jinja2.nodes.TemplateData)]
        constants = [node.value for node in nodes.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
        self.literal_text = "\0".join([*data, *constants])
        """Everything it can write by itself; no token spans two of its strings."""
        self._reads = functools.cache(self._find_whether_it_reads)

    def fit(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Normalised messages with their content as strings, or as lists of parts where the template reads those."""
        return [self._fit(message) for message in messages]

    def render(self, messages: Sequence[dict[str, Any]], context: Mapping[str, Any]) -> str:
        """Text of fitted ``messages`` with the variables of ``context``.

        Raises:
            ValueError: the template refuses the messages or fails on them.
        """
        try:
            return self._template.render({**context, "messages": messages})
        except Exception as error:  # whatever a stranger's template may raise
            raise ValueError(f"the chat template cannot render these messages: {error}") from error

    def _fit(self, message: dict[str, Any]) -> dict[str, Any]:
        role, content = message["role"], message.get("content")
        if isinstance(content, list) and not self._reads(role, True):
            return {**message, "content": "".join(part["text"] for part in content)}
        if isinstance(content, str) and not self._reads(role, False) and self._reads(role, True):
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _find_whether_it_reads(self, role: str, parts: bool) -> bool:
        """Whether messages of ``role`` keep their text, content being a list of parts or else a string.

        A short chat is rendered to find out: templates read parts in loops, macros and filters of many kinds.
        """

        def content(*texts: str) -> Any:
            return [{"type": "text", "text": text} for text in texts] if parts else "".join(texts)

        user, probe = {"role": "user", "content": content("Hi")}, {"role": role, "content": content(*PROBES)}
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
        chats = {
            "system": [probe, user],
            "assistant": [user, probe],
            "tool": [user, {"role": "assistant", "tool_calls": [call]}, {**probe, "tool_call_id": call["id"]}],
        }
        context = {"tools": None, "documents": None, "add_generation_prompt": False, "bos_token": "", "eos_token": ""}
        try:
            text = self._template.render({**context, "messages": chats.get(role, [probe])})
        except Exception:
            return False
        return all(part in text for part in PROBES) and not WRITTEN_AS_DATA.search(text)


class ChatTemplates:
    """The templates of a model by name; ``default`` is used unless there are tools and one for ``tool_use``."""

    def __init__(self, texts: Mapping[str, str]):
        self._templates = {name: ChatTemplate(text) for name, text in texts.items()}

    @property
    def literal_text(self) -> str:
        """Everything that they can write by themselves."""
        return "\0".join(template.literal_text for template in self._templates.values())

    @classmethod
    def from_folder(cls, folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplates:
        """Read them from their own files, or else from ``tokenizer_config.json``, or ``chat_template.json``.

        Raises:
            CheckpointError: a file is damaged.
        """
        files = {path.stem: path for path in sorted((folder / NAMED_FILES).glob("*.jinja"))}
        if (folder / FILE).is_file():
            files = {"default": folder / FILE, **files}
        if files:
            return cls({name: read_text(path) for name, path in files.items()})
        given = tokenizer_config.get("chat_template")
        if given is None:
            given = read_json(folder / LEGACY_FILE, missing={}).get("chat_template")
        return cls(_by_name(given))

    def choose(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """The template for a chat with these tools.

        Raises:
            CheckpointError: the model has none, or none of the right name.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name in self._templates:
            return self._templates[name]
        if self._templates:
            names = ", ".join(sorted(self._templates))
            raise CheckpointError(f"this model's chat templates are {names}; without tools one named default is needed")
        raise CheckpointError(f"this model has no chat template ({FILE}); give it plain text instead")


def _by_name(given: Any) -> dict[str, str]:
    """Templates as ``tokenizer_config.json`` has them: one text, a list of named ones, or a dict."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        pairs = [(entry.get("name"), entry.get("template")) for entry in given]
    else:
        pairs = list(given.items()) if isinstance(given, dict) else [(None, None)]
    if all(isinstance(text, str) for pair in pairs for text in pair):
        return dict(pairs)
    raise CheckpointError("chat_template must be a text, or a list of templates that have a name and a template each")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}``, which marks the model's own text for training, means its body."""

    tags = {"generation"}  # noqa: RUF012 # declared so by Jinja

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja's sandbox with the names that Hugging Face templates may use."""

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
