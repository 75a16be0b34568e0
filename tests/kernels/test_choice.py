"""Which attention is had: by name, by kind of device, or not at all and why."""

from __future__ import annotations

import logging
import sys

import pytest

from astraea_jax.errors import StartupError
from astraea_jax.kernels import choose

LLAMA = {"kv_heads": 8, "head_dim": 128, "page_size": 16, "dtype": "bfloat16"}


@pytest.fixture
def tokamax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that a package is installed; nothing of it is called."""
    monkeypatch.setitem(sys.modules, "tokamax", type(sys)("tokamax"))
    sys.modules["tokamax"].__spec__ = type(sys.__spec__)("tokamax", None)


def test_a_cpu_has_the_kernels_in_cpp():
    assert choose(None, "cpu", **LLAMA).name == "native"


def test_a_cpu_has_the_reference_for_what_they_cannot(caplog):
    assert choose(None, "cpu", **(LLAMA | {"dtype": "float16"})).name == "reference"
    (message,) = caplog.messages
    assert message.startswith("attention: reference, because")
    assert "not float16" in message


@pytest.mark.usefixtures("tokamax")
def test_a_tpu_has_tokamax_if_it_is_installed(caplog):
    with caplog.at_level(logging.INFO):
        assert choose(None, "tpu", **LLAMA).name == "tokamax"
    assert caplog.messages == ["attention: tokamax"]


@pytest.mark.parametrize(("sizes", "name"), [({}, "jax-rpa"), ({"head_dim": 64}, "pallas")])
def test_what_else_a_tpu_has_is_announced(sizes, name, caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    assert choose(None, "tpu", **(LLAMA | sizes)).name == name
    (message,) = caplog.messages
    assert message.startswith(f"attention: {name}, because")
    assert "tokamax is not installed" in message


@pytest.mark.parametrize(
    ("name", "platform", "sizes", "why"),
    [
        ("pallas", "cpu", {}, "is for TPUs, but JAX runs on cpu"),
        ("native", "gpu", {}, "is for CPUs, but JAX runs on gpu"),
        ("jax-rpa", "tpu", {"head_dim": 64}, "128 dimensions, not 64"),
        ("pallas", "tpu", {"page_size": 4}, "multiple of 8 tokens, not 4"),
        ("pallas", "tpu", {"dtype": "float16"}, "not float16"),
        (None, "tpu", {"dtype": "float16"}, "'jax-rpa' .*not float16.*'pallas' .*not float16"),
    ],
)
def test_what_cannot_be_had_says_why(name, platform, sizes, why):
    with pytest.raises(StartupError, match=why):
        choose(name, platform, **(LLAMA | sizes))


@pytest.mark.usefixtures("tokamax")
@pytest.mark.parametrize(
    ("sizes", "why"), [({"dtype": "float32"}, "float32"), ({"head_dim": 80}, "80"), ({"page_size": 8}, "8")]
)
def test_tokamax_says_what_it_cannot(sizes, why):
    with pytest.raises(StartupError, match=f"not {why}"):
        choose("tokamax", "tpu", **(LLAMA | sizes))
