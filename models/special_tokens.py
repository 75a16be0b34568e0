"""Special and added tokens of a Hugging Face folder beside ``tokenizer.json``, read as transformers 5 does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from .config import CheckpointError
from .config_file import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def register_special_tokens(
    folder: Path, tokenizer: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any]
) -> dict[str, str]:
    """Add the tokens to ``tokenizer`` that only the other files know; return the named ones, which templates refer to.

    ``special_tokens_map.json`` and ``added_tokens.json``, of older releases, count unless ``tokenizer_config.json`` has
    an ``added_tokens_decoder``; then its special tokens win.

    Raises:
        CheckpointError: a file is damaged.
    """
    config = dict(tokenizer_config)
    if "added_tokens_decoder" in config:
        listed = {_id(key): _token(record) for key, record in _dict(config, "added_tokens_decoder").items()}
    else:
        config |= read_json(folder / "special_tokens_map.json", missing={})
        special = {token.content for token in (*_named(config).values(), *_extra(config))}
        older = read_json(folder / "added_tokens.json", missing={})
        listed = {_id(i): AddedToken(text, special=text in special) for text, i in older.items()}
        listed |= tokenizer.get_added_tokens_decoder()
    named = _named(config)
    same = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    # A text that is there already with other flags is added again, and these flags hold.
    tokenizer.add_tokens([listed[i] for i in sorted(listed) if repr(listed[i]) not in same])
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for token in (*named.values(), *_extra(config)) if token.content not in there])
    return {name: token.content for name, token in named.items()}


def _named(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Tokens with a name: those every model may have, and a model's own, such as ``image_token``."""
    named = {name: config[name] for name in NAMED if config.get(name) is not None}
    named |= {name: text for name, text in config.items() if name.endswith("_token") and isinstance(text, str)}
    if isinstance(extra := config.get("extra_special_tokens"), dict):
        named |= extra
    return {name: _token(given, special=True) for name, given in named.items()}


def _extra(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, list | dict):
        raise CheckpointError(f"extra_special_tokens is {extra!r}; a list of tokens is needed")
    if isinstance(extra, list):
        yield from (_token(token, special=True) for token in extra)


def _token(given: Any, **forced: bool) -> AddedToken:
    """A token as plain text, or as a record with ``content`` and flags."""
    record = {"content": given} if isinstance(given, str) else given
    flags = {name: record[name] for name in FLAGS if name in record} if isinstance(record, dict) else {}
    if (
        not isinstance(record, dict)
        or not isinstance(text := record.get("content"), str)
        or not all(isinstance(flag, bool) for flag in flags.values())
    ):
        raise CheckpointError(f"a special token is {given!r}; a text, or a record with content and flags, is needed")
    return AddedToken(text, **flags | forced)


def _dict(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    if not isinstance(value := config[field], dict):
        raise CheckpointError(f"tokenizer_config.json: {field} is {value!r}; an object is needed")
    return value


def _id(given: Any) -> int:
    if isinstance(given, bool) or not str(given).isdecimal():
        raise CheckpointError(f"{given!r} is no token id; a number is needed")
    return int(given)
