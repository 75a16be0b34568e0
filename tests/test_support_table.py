"""docs/hardware.md claims for each backend what a test shows, and nothing else."""

from __future__ import annotations

import pytest
from support.table import DOCUMENT, marks, split, table


def test_the_readme_says_what_the_tests_cover():
    assert split(DOCUMENT.read_text())[1] == table(), "run `python tests/support/table.py`"


def test_marks_are_read_from_test_functions():
    source = '@pytest.mark.serves("triton", "tested", "a", "b")\ndef {}(): pass'
    assert marks(source.format("test_x")) == [("triton", "tested", "a", "b")]
    assert marks(source.format("helper")) == []


def test_an_unknown_mark_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "test_x.py").write_text('@pytest.mark.serves("cuda", "tested", "a")\ndef test_x(): pass')
    monkeypatch.setattr("support.table.TESTS", tmp_path)
    with pytest.raises(ValueError, match="marks 'cuda'"):
        table()
