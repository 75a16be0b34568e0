"""Weights of tenants as text."""

from __future__ import annotations

import pytest

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.tenant_weights import MOST, Weights, parsed
from astraea_jax.errors import StartupError


def test_tenants_and_weights_are_read():
    assert parsed("key:ab=2,salt:x=y=0.5, =3,") == {"key:ab": 2.0, "salt:x=y": 0.5, "": 3.0}
    assert parsed(None) == {}


def test_a_file_has_one_on_each_line(tmp_path):
    (tmp_path / "weights").write_text("# ours\nkey:ab=2\n\nsalt:a,b=0\n")
    assert parsed(f"@{tmp_path / 'weights'}") == {"key:ab": 2.0, "salt:a,b": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a=",
        "a=x",
        "a=-1",
        "a=nan",
        "a=inf",
        f"a={2 * MOST}",
        "a=1,a=2",
        "",
        " ",
        ",",
        "@",
        "@/no/such/file",
        "=",
        1,
    ],
)
def test_what_gives_no_weights_is_refused_at_the_start(text):
    assert text not in Weights()
    with pytest.raises(StartupError, match=r"^tenant_weights is .*; it must be tenant=weight"):
        EngineConfig(tenant_weights=text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "weights").write_bytes(b"\xff\xfe=1")
    with pytest.raises(StartupError, match="tenant_weights"):
        EngineConfig(tenant_weights=f"@{tmp_path / 'weights'}")
