"""Tokenizers and chat templates of the folders in tests/support/reading.py, read as transformers 5 did."""

from __future__ import annotations

import json

import pytest
from support.reading import GOLDENS, VARIANTS, check

EXPECTED = json.loads(GOLDENS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_as_transformers_reads_it(variant, tmp_path):
    check(variant, variant.write(tmp_path / "model"), EXPECTED[variant.name])


def test_there_is_an_answer_to_every_variant():
    assert list(EXPECTED) == [variant.name for variant in VARIANTS]
