"""The engine's configuration as flags of scripts."""

from __future__ import annotations

import dataclasses

from support.scripts import run

from astraea_jax.engine.config import EngineConfig
from astraea_jax.frontends.flags import MODEL, OPTIONS


def test_every_field_that_an_operator_chooses_is_a_flag():
    """The compile cache has a default of serve.py's own."""
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    assert fields - {*OPTIONS} == {"compile_cache"}
    assert {*MODEL} <= {*OPTIONS} <= fields


def test_help_shows_them_and_what_they_are_by_default():
    said = run("scripts/serve.py", "--help")
    assert all(f"--{name}:" in said or f"--[no]{name}:" in said for name in OPTIONS)
    assert "--max_seqs: Requests that run at once; by default 256, on a CPU 64." in said
    assert "(default: '1024')" in said[said.index("--max_queued:") :][:200]
