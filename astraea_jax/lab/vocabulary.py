"""A tokenizer with as many tokens as large models have, and a small model with random weights that writes them.

What constrained decoding costs grows with the vocabulary, not with the model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.loading import ModelOnDevices
from astraea_jax.models import resolve
from astraea_jax.models.checkpoint import random_decoder
from astraea_jax.models.config_file import read_json
from astraea_jax.models.families import read_config
from astraea_jax.models.tokenizer import Tokenizer

LETTERS = np.array([*'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:,"{}[]()'])
SPACE = "Ġ"
"""A space as byte-level tokenizers write it."""


def wide_model(size: int, config: EngineConfig) -> ModelOnDevices:
    """Make astraea-tiny's shape with random weights and ``size`` tokens."""
    shape = read_config(read_json(resolve("astraea-tiny") / "config.json"))
    [mesh, *others] = config.meshes(shape)
    decoder = random_decoder(replace(shape, vocab_size=size), config.weight_dtype(), 0, mesh)
    jax.block_until_ready(jax.tree.leaves(decoder))
    return ModelOnDevices(decoder, wide_tokenizer(size), [mesh, *others])


def wide_tokenizer(size: int) -> Tokenizer:
    """Make astraea-tiny's tokenizer with ``size`` tokens: its own, and random words, half of them behind a space."""
    folder = resolve("astraea-tiny")
    with tempfile.TemporaryDirectory() as made:
        for file in ("tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja"):
            shutil.copy(folder / file, made)
        tokenizer = read_json(folder / "tokenizer.json")
        vocabulary = tokenizer["model"]["vocab"]
        taken = {*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])}
        words = _words(set(vocabulary), size - len(taken))
        vocabulary.update(zip(words, (i for i in range(size) if i not in taken), strict=True))
        (Path(made) / "tokenizer.json").write_text(json.dumps(tokenizer))
        return Tokenizer.from_folder(Path(made))


def _words(known: set[str], count: int) -> list[str]:
    rng, found = np.random.default_rng(0), dict.fromkeys(known)
    while len(found) < len(known) + count:
        word = "".join(rng.choice(LETTERS, rng.integers(2, 9)))
        found[SPACE * int(rng.integers(2)) + word] = None
    return [*found][len(known) :]
