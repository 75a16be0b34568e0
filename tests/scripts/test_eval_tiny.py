"""The evaluation of astraea-tiny on a few tasks."""

from __future__ import annotations

from support.scripts import run


def test_the_bundled_model_solves_its_tasks():
    assert "100.0%" in run("scripts/eval_tiny.py", "--tasks=20", "--wanted=1")
