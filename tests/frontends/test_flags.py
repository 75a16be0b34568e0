"""The engine's configuration as flags of scripts."""

from __future__ import annotations

import dataclasses

from support.forked import say

from astraea_jax.engine.config import EngineConfig
from astraea_jax.frontends.flags import MODEL, OPTIONS


def test_every_field_that_an_operator_chooses_is_a_flag():
    """The compile cache has a default of serve.py's own."""
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    assert fields - {*OPTIONS} == {"compile_cache", "kv_events"}
    assert {*MODEL} <= {*OPTIONS} <= fields


def test_help_shows_them_and_what_they_are_by_default():
    status, said = say("scripts/serve.py", "--help")
    assert status == 0
    assert all(f"--{name}:" in said or f"--[no]{name}:" in said for name in OPTIONS)
    assert "--max_seqs: Requests that run at once; by default 256, on a CPU 64." in said
    assert "(default: '1024')" in said[said.index("--max_queued:") :][:200]


def test_what_is_by_default_elsewhere_is_not_said_of_a_script_with_a_default_of_its_own():
    _, said = say("scripts/bench_jct.py", "--help")
    assert "--max_seqs: Requests that run at once.\n    (default: '32')" in said
    assert "--page_size: Tokens per KV page; by default 64, on a CPU 16." in said


def test_what_is_no_number_is_told():
    status, said = say("scripts/serve.py", "--step_timeout_s=nan")
    assert status
    assert "--step_timeout_s: nan is not a number" in said
