"""What is said while a model is loaded."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.loading import load_model
from astraea_jax.models.checkpoint import copy_beside

LONGROPE = Path(__file__).parents[1] / "parity" / "goldens" / "phi3-long-partial-tied"
"""Its original context are 32 tokens."""


@pytest.mark.parametrize(("room", "kind"), [(None, "long"), (32, "short"), (33, "long")])
def test_the_choice_between_rotary_embeddings_is_logged_once(room, kind, random_folder, tmp_path, caplog):
    folder = shutil.copytree(LONGROPE, tmp_path / "model")
    copy_beside(random_folder, folder)
    with caplog.at_level(logging.INFO):
        decoder = load_model(folder, EngineConfig(max_context=room)).decoder
    assert decoder.config.rope.scaling.long is (kind == "long")
    [said] = [record.getMessage() for record in caplog.records if "rotary" in record.getMessage()]
    assert f"those for {kind} ones serve all, since max_context is {room or 256}" in said
