"""Compilers of grammars for two tokenizers, and walks through what their masks allow."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from astraea_jax.engine.grammar import Grammar, GrammarCompiler
from astraea_jax.models.tokenizer import Tokenizer

TINY = Tokenizer.from_folder(Path(__file__).parents[2] / "models" / "astraea-tiny")
EXTRA = 40
"""Tokens that a model has beyond its tokenizer's."""


def merged(*special: str, end: str = "<|end|>") -> Tokenizer:
    """A byte-level tokenizer with merges across the borders of JSON's tokens, and some special tokens.

    ``end`` is the one that ends a turn.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        '{"a": 1, "b": [true, false, null], "name": "é😀ß"}',
        '"}, {"',
        '": "',
        '"}}\n',
        "-12.5e+3",
        "\\u00e9\\n",
    ] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([end, *special])
    end_id = tokenizer.token_to_id(end)
    return Tokenizer(tokenizer, bos_id=None, eos_ids=frozenset([end_id]), template=None, special={})


MERGED = merged()
COMPILERS = {"tiny": GrammarCompiler(TINY), "merged": GrammarCompiler(MERGED)}
TOKENIZERS = {"tiny": TINY, "merged": MERGED}


def allowed(matcher, words):
    row = np.full(words, -1, np.int32)
    matcher.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(grammar: Grammar, tokenizer: Tokenizer, seed: int, steps: int = 2000) -> str | None:
    """The text of a random walk through the masks that ends as soon as it may; None: it has not ended."""
    rng = random.Random(seed)
    matcher = grammar.matcher()
    words = (tokenizer.vocab_size + EXTRA + 31) // 32
    tokens: list[int] = []
    controls = set(tokenizer.added_tokens().values())
    for _ in range(steps):
        choices = allowed(matcher, words)
        assert choices
        assert max(choices) < tokenizer.vocab_size
        if any(token in tokenizer.eos_ids for token in choices):
            break
        # Long tokens first, and what closes: a walk among all characters would rarely end.
        likely = sorted(choices, key=lambda token: -len(tokenizer.decode([token])))[:8]
        closing = [token for token in choices if tokenizer.decode([token]).strip() in ('"', "'", "}", "]", ")", ">")]
        closing += [token for token in choices if token in controls]
        tokens.append(rng.choice(closing if closing and rng.random() < 0.4 else rng.choice([likely, choices])))
        assert matcher.accept(tokens[-1])
        if matcher.finished:
            break
    else:
        return None
    return tokenizer._tokenizer.decode(tokens, skip_special_tokens=False)


def read(text: str) -> Any:
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    return value


def follow(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether every token of the text is allowed, and the text may end there."""
    matcher = grammar.matcher()
    words = (tokenizer.vocab_size + 31) // 32
    for token in tokenizer.encode(text):
        if token not in allowed(matcher, words):
            return False
        assert matcher.accept(token)
    return bool(tokenizer.eos_ids & set(allowed(matcher, words)))
