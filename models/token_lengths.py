"""A bound on the text of one token, so that a text which cannot fit is refused before it is tokenised."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

COMPOSED = 4
"""Characters that Unicode's composition makes one of at most, such as a letter with three marks."""

KEEPS_TEXT = frozenset({"ByteLevel", "Digits", "Metaspace", "Split", "Punctuation", "UnicodeScripts", "Sequence"})
"""Pre-tokenizers that divide a text and drop nothing of it, if their behaviour is not ``Removed``."""


def longest_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Characters of text that one token stands for at most; None if that is not certain.

    It is certain for BPE over bytes, or with bytes to fall back on, between steps that drop no text. Unknown characters
    may vanish or become one token together elsewhere, and so may spaces around added tokens that strip them.
    """
    if not _every_byte_is_known(tokenizer):
        return None
    if any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values()):
        return None
    shrinks = _shrinks(_state(tokenizer.normalizer))
    if shrinks is None or not _keeps_text(_state(tokenizer.pre_tokenizer)):
        return None
    return shrinks * max(map(len, tokenizer.get_vocab()))


def _state(component: Any) -> dict[str, Any]:
    """The configuration of a normalizer or pre-tokenizer, as tokenizer.json has it."""
    state: dict[str, Any] = {} if component is None else json.loads(component.__getstate__())
    return state


def _every_byte_is_known(tokenizer: tokenizers.Tokenizer) -> bool:
    if not isinstance(tokenizer.model, BPE):
        return False
    if tokenizer.model.byte_fallback:
        letters = [f"<0x{byte:02X}>" for byte in range(256)]
    elif "ByteLevel" in {step["type"] for step in _steps(_state(tokenizer.pre_tokenizer), "pretokenizers")}:
        letters = ByteLevel.alphabet()
    else:
        return False
    return all(tokenizer.token_to_id(letter) is not None for letter in letters)


def _steps(state: dict[str, Any], parts: str) -> list[dict[str, Any]]:
    """The steps of a component, which is a sequence or a step itself; none if there is no component."""
    if state.get("type") != "Sequence":
        return [state] if state else []
    return [step for part in state[parts] for step in _steps(part, parts)]


def _keeps_text(state: dict[str, Any]) -> bool:
    return all(
        step["type"] in KEEPS_TEXT and step.get("behavior") != "Removed" for step in _steps(state, "pretokenizers")
    )


def _shrinks(state: dict[str, Any]) -> int | None:
    """By how much a normalizer divides the length of a text at most; None if it may drop any part."""
    most = 1
    for step in _steps(state, "normalizers"):
        match step:
            case {"type": "NFC" | "NFKC"}:
                most *= COMPOSED
            case {"type": "NFD" | "NFKD" | "Lowercase" | "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if len(new) >= len(old):
                pass
            case _:
                return None
    return most
