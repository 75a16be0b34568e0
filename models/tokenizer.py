"""Text to tokens and back, and chats to text, from the files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers.decoders import ByteLevel, DecodeStream

from .config import CheckpointError, read_json

Message = Mapping[str, Any]


class Tokenizer:
    """Tokenizer, special tokens and chat template of one model.

    Args:
        tokenizer: of the ``tokenizers`` library.
        bos_id: beginning-of-sequence token, if the model has one.
        eos_ids: tokens that end a generation.
        template: Jinja chat template, if the model has one.
        special: named special tokens as templates refer to them, such as ``{"eos_token": "<|im_end|>"}``.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: frozenset[int],
        template: str | None,
        special: Mapping[str, str],
    ):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        named = [special[name] for name in ("bos_token", "eos_token", "pad_token") if name in special]
        ids = [i for i in (bos_id, *eos_ids, *map(tokenizer.token_to_id, named)) if i is not None and 0 <= i < 2**32]
        self.delimiters = {i: text for i in ids if (text := tokenizer.id_to_token(i)) is not None}
        """Tokens that begin, end and pad sequences, and so are not text; other special tokens are."""
        self._special = dict(special)
        self._whole: dict[int, str | None] = {}
        self._template = _compile(template) if template is not None else None

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and the chat template.

        Raises:
            CheckpointError: there is no tokenizer, or a file is damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        config = read_json(folder / "tokenizer_config.json", missing={})
        special = {name: text for name in ("bos_token", "eos_token") if (text := _token_text(config.get(name)))}
        generation = read_json(folder / "generation_config.json", missing={})
        eos = _ids(generation.get("eos_token_id")) | _ids(
            read_json(folder / "config.json", missing={}).get("eos_token_id")
        )
        if "eos_token" in special:
            eos |= _ids(tokenizer.token_to_id(special["eos_token"]))
        return cls(
            tokenizer,
            bos_id=tokenizer.token_to_id(special["bos_token"]) if "bos_token" in special else None,
            eos_ids=frozenset(eos),
            template=_template_text(folder, config),
            special=special,
        )

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Token ids of ``text``. Special tokens written in it count as such, as in rendered chats."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without :attr:`delimiters`. Other special tokens, such as ``<tool_call>``, are text."""
        text: str = self._tokenizer.decode([i for i in ids if i not in self.delimiters], skip_special_tokens=False)
        return text

    def stream(self) -> TextStream:
        """A decoder for tokens that come one after the other."""
        return TextStream(self._tokenizer, self._whole, self.delimiters)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat as the model was trained to read it.

        Args:
            messages: OpenAI-shaped.
            tools: OpenAI-shaped function schemas.
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            CheckpointError: the model has no chat template.
            ValueError: the template refuses the messages or fails on them.
        """
        if self._template is None:
            raise CheckpointError("this model has no chat template (chat_template.jinja); give it plain text instead")
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **self._special
            )
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise ValueError(f"the chat template cannot render these messages: {error}") from error


class TextStream:
    """Decodes tokens as they come and never shows half a character.

    Bytes that never become a character come out as U+FFFD at the next whole character, or at the end.

    Args:
        tokenizer: of the ``tokenizers`` library.
        whole: what its streams have learned about single tokens: the text of each, None if it is not whole characters.
        delimiters: see :attr:`Tokenizer.delimiters`; for whoever leaves them out, since a stream decodes every token.
    """

    LONGEST = 64
    """Tokens that are held back at most while they make no character."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, whole: dict[int, str | None], delimiters: Mapping[int, str]):
        self._tokenizer = tokenizer
        self.delimiters = delimiters
        self._whole = whole
        self._apart = isinstance(tokenizer.decoder, ByteLevel)  # a token's bytes do not depend on its neighbours
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []
        """Tokens that have made no text yet."""

    def push(self, token: int) -> str:
        """Text that ``token`` completes."""
        if self._apart and not self._held:
            if token not in self._whole:
                alone: str = self._tokenizer.decode([token], skip_special_tokens=False)
                self._whole[token] = None if "\ufffd" in alone else alone
            if (known := self._whole[token]) is not None:
                return known
        self._held.append(token)
        try:
            text: str | None = self._stream.step(self._tokenizer, token)
        except Exception:  # the library raises a bare one where a decoder rewrites text that is out already
            return self.flush()
        if text is None:
            return self.flush() if len(self._held) == self.LONGEST else ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """What is left at the end."""
        text: str = self._tokenizer.decode(self._held, skip_special_tokens=False) if self._held else ""
        self._held.clear()
        self._stream = DecodeStream(skip_special_tokens=False)
        return text


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {v for v in values if isinstance(v, int)}


def _token_text(value: Any) -> str | None:
    """A special token of ``tokenizer_config.json``: plain text or a record with ``content``."""
    return value.get("content") if isinstance(value, dict) else value


def _template_text(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    value = config.get("chat_template")
    if isinstance(value, list):  # several named ones
        value = next((entry["template"] for entry in value if entry.get("name") == "default"), None)
    return value


def _compile(text: str) -> jinja2.Template:
    """A template in Jinja's sandbox, with the names that Hugging Face templates may use."""

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # Jinja's own escapes HTML

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is damaged: {error}") from error
