"""The library of kernels for CPUs: built once, and a reason wherever it cannot be had."""

from __future__ import annotations

import logging
import os
import shutil

import jax.numpy as jnp
import pytest

from astraea_jax.errors import StartupError
from astraea_jax.folders import private_folder
from astraea_jax.kernels.choice import choose
from astraea_jax.kernels.native import attention, library

SIZES = {"kv_heads": 1, "head_dim": 16, "page_size": 4, "dtype": jnp.float32}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache folder of its own, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    fresh = library.load.__wrapped__
    for module in (library, attention):
        monkeypatch.setattr(module, "load", fresh)
    return tmp_path


def test_it_is_built_once(caplog):
    caplog.set_level(logging.INFO)
    built = library._built()
    assert [line for line in caplog.messages if "building the kernels for CPUs" in line]
    caplog.clear()
    assert library._built() == built
    assert not caplog.messages
    assert [file.name for file in built.parent.iterdir()] == [built.name]


def test_other_sources_make_another_one(tmp_path, monkeypatch):
    for file in library.SOURCES.iterdir():
        if file.suffix in (".cc", ".h"):
            shutil.copy(file, tmp_path)
    command = ["c++", "-O3"]
    files = sorted(tmp_path.glob("*.*"))
    before = library._digest(command, files)
    assert library._digest(command, files) == before
    assert library._digest([*command, "-g"], files) != before
    files[0].write_text(files[0].read_text() + "\n")
    assert library._digest(command, files) != before


def test_without_a_compiler_the_reference_serves_and_says_why(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nowhere")
    assert choose(None, "cpu", **SIZES).name == "reference"
    assert "there is no C++ compiler; install g++ or clang++" in caplog.text
    with pytest.raises(StartupError, match="no C"):
        choose("native", "cpu", **SIZES)


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("no-such-compiler -O1", "CXX names 'no-such-compiler -O1', which is not there"), ("false", "cannot be built")],
)
def test_a_compiler_that_is_named_is_the_one_that_is_used(monkeypatch, compiler, why):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(StartupError, match=why):
        library.load()


def test_what_the_compiler_says_is_told(tmp_path, monkeypatch):
    (tmp_path / "broken.cc").write_text("this is no C++")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    with pytest.raises(StartupError, match=r"cannot be built: .*broken\.cc.*error"):
        library.load()
    assert not list((tmp_path / "astraea_jax" / "native").iterdir()), "something is left behind"


def test_a_folder_that_everybody_may_write_to_is_refused(tmp_path):
    folder = tmp_path / "astraea_jax" / "native"
    folder.mkdir(parents=True)
    os.chmod(folder, 0o777)
    with pytest.raises(StartupError, match="chmod o-w it"):
        library.load()


def test_a_broken_library_is_built_anew(caplog):
    built = library._built()
    built.write_bytes(b"\x7fELF")
    assert library._loaded().Attention
    assert "cannot be loaded" in caplog.text


def test_what_cannot_be_loaded_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_built", lambda: tmp_path / "nothing.so")
    with pytest.raises(StartupError, match="cannot be loaded"):
        library.load()


def test_a_folder_of_another_user_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    if os.getuid() == 0:  # whose folders everybody trusts
        os.chown(tmp_path, 4712, -1)
    with pytest.raises(StartupError, match="another user's"):
        private_folder(tmp_path, "the folder")


def test_without_a_home_there_is_a_reason(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(library.Path, "home", _no_home)
    with pytest.raises(StartupError, match="set XDG_CACHE_HOME"):
        library.load()


def _no_home() -> None:
    raise RuntimeError("Could not determine home directory.")
