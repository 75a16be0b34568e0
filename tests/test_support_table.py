"""docs/hardware.md and README.md claim for each backend what a test shows, and nothing else."""

from __future__ import annotations

import pytest
from support import model_table
from support.table import DOCUMENT, marks, split, table
from support.variants import VARIANTS

from astraea_jax.models.family_table import ARCHITECTURES


def test_the_readme_says_what_the_tests_cover():
    assert split(DOCUMENT.read_text())[1] == table(), "run `python tests/support/table.py`"


def test_the_models_of_the_readme_are_those_of_the_tests():
    inside = model_table.DOCUMENT.read_text().partition(model_table.BEGIN)[2].partition(model_table.END)[0]
    assert inside == model_table.model_table(), "run `PYTHONPATH=tests python tests/support/model_table.py`"


def test_every_family_is_compared_with_transformers():
    assert {*model_table.NAMES} == {*ARCHITECTURES} == {variant.family for variant in VARIANTS}


def test_the_family_that_contributing_shows_is_as_shown():
    root = model_table.DOCUMENT.parent
    shown = (root / "CONTRIBUTING.md").read_text().partition("```diff\n")[2].partition("```")[0].splitlines()
    assert len(shown) < 60
    for line in shown:
        if line.startswith("--- "):
            there = (root / line.removeprefix("--- ")).read_text().splitlines()
        else:
            assert line.removeprefix("+") in there


def test_marks_are_read_from_test_functions():
    source = '@pytest.mark.serves("triton", "tested", "a", "b")\ndef {}(): pass'
    assert marks(source.format("test_x")) == [("triton", "tested", "a", "b")]
    assert marks(source.format("helper")) == []


def test_an_unknown_mark_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "test_x.py").write_text('@pytest.mark.serves("cuda", "tested", "a")\ndef test_x(): pass')
    monkeypatch.setattr("support.table.TESTS", tmp_path)
    with pytest.raises(ValueError, match="marks 'cuda'"):
        table()
