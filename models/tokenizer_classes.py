"""Tokenizer classes of transformers 5 that do not take everything from ``tokenizer.json``.

They take its vocabulary, merges and post-processor, and make the rest themselves, from ``tokenizer_config.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from .config import CheckpointError
from .config_file import read_json
from .special_tokens import register_special_tokens

Config = Mapping[str, Any]

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerClass:
    """Describes what a class makes itself."""

    rules: Callable[[tokenizers.Tokenizer, Config], None]
    """Gives a tokenizer its normalizer, pre-tokenizer and decoder."""
    named: Config
    """Special tokens that ``tokenizer_config.json`` may leave out."""
    bytes_for_unknown: bool = False
    """Whether characters without a token become bytes, as SentencePiece has them."""
    resets_flags: bool = False
    """Whether named special tokens lose flags such as ``lstrip``."""


def build_like_its_class(
    folder: Path, tokenizer: tokenizers.Tokenizer, config: Config
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Return the tokenizer with all its special tokens as its class makes it, and the named ones for templates.

    Args:
        folder: of the model; ``config.json`` has a say in which class it is.
        tokenizer: the one in ``tokenizer.json``, which most classes take whole.
        config: contents of ``tokenizer_config.json``.

    Raises:
        CheckpointError: a file is damaged, the class is not read here, or it cannot use this ``tokenizer.json``.
    """
    name = _class_name(folder, config)
    if name in UNREAD:
        raise CheckpointError(
            f"tokenizer_class {name} is not read; if tokenizer.json alone describes the tokenizer, name "
            "PreTrainedTokenizerFast in tokenizer_config.json"
        )
    kind = CLASSES.get(name)
    if kind is None:
        return tokenizer, register_special_tokens(folder, tokenizer, config)
    if not isinstance(tokenizer.model, models.BPE):
        raise CheckpointError(
            f"tokenizer_class {name} needs a BPE model, tokenizer.json has {type(tokenizer.model).__name__}"
        )
    built = _with_rules(tokenizer, kind, config)
    if "added_tokens_decoder" not in config:
        added = tokenizer.get_added_tokens_decoder()
        built.add_tokens([added[i] for i in sorted(added)])
    special = register_special_tokens(folder, built, {**kind.named, **config})
    if kind.resets_flags:
        built.add_tokens([AddedToken(text, special=True) for text in special.values()])
    return built, special


def _with_rules(tokenizer: tokenizers.Tokenizer, kind: TokenizerClass, config: Config) -> tokenizers.Tokenizer:
    """The vocabulary, merges and post-processor of ``tokenizer`` with the rules of a class, without added tokens."""
    model = tokenizer.model
    model.unk_token = model.continuing_subword_prefix = model.end_of_word_suffix = None
    model.fuse_unk = model.byte_fallback = kind.bytes_for_unknown
    model.ignore_merges = False
    built = tokenizers.Tokenizer(model)
    built.post_processor = tokenizer.post_processor
    kind.rules(built, config)
    return built


def _class_name(folder: Path, config: Config) -> str:
    """Name of the class that transformers takes, without ``Fast``; empty: none is named."""
    model = read_json(folder / "config.json", missing={})
    model_type = model.get("model_type")
    declared = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
    if not isinstance(declared, str):
        raise CheckpointError(f"tokenizer_class is {declared!r}; a name is needed")
    name = declared.removesuffix("Fast")
    if model_type == "qwen2":  # whatever is declared, since much of it is wrong
        return "Qwen2Tokenizer"
    if name == "LlamaTokenizer" and b'"ByteLevel"' in (folder / "tokenizer.json").read_bytes():
        return ""  # tokenizers of Llama 3's kind declare this class, too
    return name or ("Qwen2Tokenizer" if model_type == "qwen3" else "")


def _flag(config: Config, name: str, default: bool) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"tokenizer_config.json: {name} is {value!r}; true or false is needed")
    return default if value is None else value


def _llama(tokenizer: tokenizers.Tokenizer, config: Config) -> None:
    spaced = _flag(config, "add_prefix_space", True)
    everywhere = _flag(config, "legacy", False)  # or only at the beginning, not after special tokens
    scheme = ("always" if everywhere else "first") if spaced else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spaced else steps)


def _qwen2(tokenizer: tokenizers.Tokenizer, config: Config) -> None:
    to_bytes = pre_tokenizers.ByteLevel(_flag(config, "add_prefix_space", False), use_regex=False)
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])


def _gpt2(tokenizer: tokenizers.Tokenizer, config: Config) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(_flag(config, "add_prefix_space", False))
    tokenizer.decoder = decoders.ByteLevel()


CLASSES = {
    "LlamaTokenizer": TokenizerClass(
        _llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}, bytes_for_unknown=True
    ),
    "Qwen2Tokenizer": TokenizerClass(
        _qwen2, dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"), resets_flags=True
    ),
    "GPT2Tokenizer": TokenizerClass(_gpt2, dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")),
}
UNREAD = frozenset({"CodeLlamaTokenizer", "CohereTokenizer", "GemmaTokenizer", "GPTNeoXTokenizer", "Qwen3_5Tokenizer"})
"""Other classes of decoders that make a part themselves."""
