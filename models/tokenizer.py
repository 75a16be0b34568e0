"""Text to tokens and back, and chats to tokens, from the files of a Hugging Face folder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel, DecodeStream

from .chat import normalise_messages, plain
from .chat_template import ChatTemplate, ChatTemplates
from .config import CheckpointError
from .config_file import part, read_json
from .control_tokens import MARKS, ControlTokens, marked
from .token_lengths import longest_token
from .tokenizer_classes import build_like_its_class

LONG_TEXT = 4096
"""Characters from which tokenising releases the interpreter's lock, which costs a short text more than it takes."""


class Tokenizer:
    """Tokenizer, special tokens and chat templates of one model.

    Args:
        tokenizer: of the ``tokenizers`` library.
        bos_id: the token that its post-processor puts before a text, if any.
        eos_ids: tokens that end a generation.
        template: Jinja chat template, if the model has one, or several by name.
        special: named special tokens as templates refer to them, such as ``{"eos_token": "<|im_end|>"}``.
        response_template: how the model's turns are to be read, if its folder says so, in transformers' form.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: frozenset[int],
        template: str | ChatTemplates | None,
        special: Mapping[str, str],
        response_template: Any = None,
    ):
        self.response_template = response_template
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
        if template is None or isinstance(template, str):
            template = ChatTemplates({} if template is None else {"default": template})
        self._templates = template
        self._control_tokens = functools.cache(self._find_control_tokens)
        self._ids_as_text = functools.cache(self._find_ids_as_text)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json``, the configurations beside it and the chat templates.

        What training left in ``tokenizer.json`` (truncation, padding, dropout) is switched off.

        Raises:
            CheckpointError: there is no tokenizer, or a file is damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
        tokenizer = _read_tokenizer(path)
        config = read_json(folder / "tokenizer_config.json", missing={})
        tokenizer, special = build_like_its_class(folder, tokenizer, config)
        if not isinstance(split := config.get("split_special_tokens", False), bool):
            raise CheckpointError(f"tokenizer_config.json: split_special_tokens is {split!r}; true or false is needed")
        tokenizer.encode_special_tokens = split
        return cls(
            tokenizer,
            bos_id=next(iter(_around(tokenizer)[0]), None),
            eos_ids=_eos_ids(folder, tokenizer, special.get("eos_token")),
            template=ChatTemplates.from_folder(folder, config),
            special=special,
            response_template=config.get("response_template"),
        )

    @property
    def template_text(self) -> str:
        """Everything that the chat templates can write by themselves."""
        return self._templates.literal_text

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Token ids of ``text``. Special tokens written in it count as such, as in rendered chats.

        Args:
            text: any.
            add_bos: add what the model's tokenizer adds to plain text, a beginning-of-sequence token or nothing. A text
                that begins with that token stays as it is.

        Raises:
            ValueError: ``text`` holds half a surrogate pair, or a word the tokenizer has no token for.
        """
        ids = _encode(self._tokenizer, text)
        if not add_bos or (self.bos_id is not None and ids[:1] == [self.bos_id]):
            return ids
        before, after = self._around_text
        return before + ids + after

    def encode_after(self, text: str) -> list[int]:
        """Token ids of ``text`` that follows other text, so that nothing is put before it.

        Raises:
            ValueError: as :meth:`encode`.
        """
        return self._encode_within(self._tokenizer, text)

    def decode(self, ids: Sequence[int], *, delimiters: bool = False) -> str:
        """Text of ``ids``. Special tokens such as ``<tool_call>`` are text, :attr:`delimiters` only if asked for."""
        shown = [i for i in ids if delimiters or i not in self.delimiters]
        text: str = self._tokenizer.decode(shown, skip_special_tokens=False)
        return text

    def to_json(self) -> str:
        """Return the contents of a ``tokenizer.json``, with every special token, for libraries that read such."""
        serialized: str = self._tokenizer.to_str()
        return serialized

    def added_tokens(self) -> dict[str, int]:
        """Text and id of the tokens that stand beside the vocabulary proper, such as ``<tool_call>``."""
        return dict(self._added)

    @functools.cached_property
    def _added(self) -> dict[str, int]:
        return {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items()}

    def stream(self) -> TextStream:
        """A decoder for tokens that come one after the other."""
        return TextStream(self._tokenizer, self._whole, self.delimiters)

    def render(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        **template_arguments: Any,
    ) -> str:
        """The chat as the model was trained to read it.

        Args:
            messages: OpenAI-shaped; see :func:`normalise_messages`.
            tools: OpenAI-shaped function schemas.
            add_generation_prompt: end with the beginning of the assistant's turn.
            template_arguments: further variables of the template, such as ``enable_thinking``.

        Raises:
            CheckpointError: the model has no chat template.
            TypeError: something is no message, or holds what has no JSON form.
            ValueError: the template refuses the messages or fails on them.
        """
        template = self._templates.choose(tools)
        fitted = template.fit(normalise_messages(messages))
        return template.render(fitted, self._context(plain(tools), add_generation_prompt, plain(template_arguments)))

    def render_chat(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        **template_arguments: Any,
    ) -> str:
        """The chat as :meth:`render` returns it, with marks for control tokens that its template did not write.

        A piece of it that begins with one of the template's own control tokens can be encoded by itself.

        Args and Raises: as :meth:`render`.
        """
        template = self._templates.choose(tools)
        fitted = template.fit(normalise_messages(messages))
        stand_ins, (hidden, hidden_tools, arguments) = self._control_tokens(template).hide(
            fitted, plain(tools), plain(template_arguments)
        )
        rendered = template.render(hidden, self._context(hidden_tools, add_generation_prompt, arguments))
        return stand_ins.to_marks(rendered, self._added)

    def encode_rendered(self, rendered: str) -> list[int]:
        """Token ids of what :meth:`render_chat` returns; tokens that are marked are encoded as the text they are."""
        first, *rest = MARKS.split(rendered)
        ids = self.encode(first)
        for i, piece in enumerate(rest):
            if i % 2:
                ids += self._encode_within(self._tokenizer, piece)
            else:
                ids += self._ids_as_text(self._tokenizer.id_to_token(marked(piece)))
        return ids

    def encode_chat(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        **template_arguments: Any,
    ) -> list[int]:
        """Token ids of the rendered chat, in which only the template's own control tokens are such.

        Those written in messages, tools and arguments are encoded as the text they are (see :mod:`.control_tokens`). A
        chat without any is encoded as :meth:`encode` does what :meth:`render` returns.

        Args and Raises: as :meth:`render`.
        """
        return self.encode_rendered(
            self.render_chat(messages, tools, add_generation_prompt=add_generation_prompt, **template_arguments)
        )

    def _context(self, tools: Any, add_generation_prompt: bool, arguments: Mapping[str, Any]) -> dict[str, Any]:
        context = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        return {**context, **self._special, **arguments}

    def _find_control_tokens(self, template: ChatTemplate) -> ControlTokens:
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        ends = {text for text, i in self._added.items() if i in self.eos_ids}
        return ControlTokens(special, {token.content for token in added} - special, template, ends)

    @functools.cached_property
    def _text_only(self) -> tokenizers.Tokenizer:
        """The same without added tokens."""
        tokenizer = tokenizers.Tokenizer(self._tokenizer.model)
        tokenizer.normalizer, tokenizer.pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        return tokenizer

    def _find_ids_as_text(self, token: str) -> list[int]:
        """Token ids of a control token as the text it is."""
        ids = self._encode_within(self._text_only, token)
        if self._tokenizer.token_to_id(token) in ids:  # the vocabulary has it as a word, too
            return [i for char in token for i in self._encode_within(self._text_only, char)]
        return ids

    @functools.cached_property
    def _around_text(self) -> tuple[list[int], list[int]]:
        """The tokens that its post-processor puts before and behind every text."""
        return _around(self._tokenizer)

    @functools.cached_property
    def longest_token(self) -> int | None:
        """Characters of text that one token stands for at most; None if that is not certain."""
        return longest_token(self._tokenizer)

    @functools.cached_property
    def _newline(self) -> list[int]:
        """Token ids of a newline."""
        return _encode(self._tokenizer, "\n")

    def _encode_within(self, tokenizer: tokenizers.Tokenizer, piece: str) -> list[int]:
        """Token ids of a piece that does not begin the text, which a tokenizer may put a space before."""
        after = _encode(tokenizer, "\n" + piece)
        if after[: len(self._newline)] == self._newline:
            return after[len(self._newline) :]
        return _encode(tokenizer, piece)


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
        """Return the text still held back, at the end."""
        text: str = self._tokenizer.decode(self._held, skip_special_tokens=False) if self._held else ""
        self._held.clear()
        self._stream = DecodeStream(skip_special_tokens=False)
        return text


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and its panics are not even that
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    return tokenizer


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        if len(text) < LONG_TEXT:
            encoding = tokenizer.encode(text, add_special_tokens=False)
        else:
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    except Exception as error:  # the library raises a bare one, or TypeError for half a surrogate pair
        raise ValueError(f"the tokenizer cannot encode {text[:40]!r}: {error}") from error
    ids: list[int] = encoding.ids
    return ids


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the post-processor puts before and behind every text."""
    try:
        encoding = tokenizer.post_process(tokenizer.encode("a", add_special_tokens=False))
    except Exception as error:
        raise CheckpointError(f"tokenizer.json cannot be used: {error}") from error
    text = [at for at, special in enumerate(encoding.special_tokens_mask) if not special]
    if not text:
        return encoding.ids, []
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]


def _eos_ids(folder: Path, tokenizer: tokenizers.Tokenizer, eos_token: str | None) -> frozenset[int]:
    """Ids in ``generation_config.json``, or else in ``config.json``, and that of the tokenizer's own token."""
    for name in ("generation_config.json", "config.json"):
        fields = read_json(folder / name, missing={})
        given = fields.get("eos_token_id", part(fields, "text_config").get("eos_token_id"))
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(f"{folder / name}: eos_token_id is {given!r}; a token id or a list of them is needed")
        if ids:
            break
    own = None if eos_token is None else tokenizer.token_to_id(eos_token)
    return frozenset(ids if own is None else [*ids, own])
