"""Models by their hub id, against a small hub on the loopback address."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub import COMMIT, small_hub

from astraea_jax.frontends.hub import find_model
from astraea_jax.models import BUNDLED
from astraea_jax.models.config import CheckpointError

STRANGERS = ("pytorch_model.bin", "modeling_evil.py", "original/model.safetensors", "consolidated.safetensors")
"""Files of a model that must not be fetched."""


@pytest.fixture(scope="module")
def published(random_folder, tmp_path_factory):
    """The random model as somebody might publish it."""
    folder = tmp_path_factory.mktemp("published")
    for path in random_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in (*STRANGERS, "additional_chat_templates/short.jinja", "orbax/d/array"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("here")
    (folder / "orbax" / "d" / "array").unlink()
    return folder


def at(monkeypatch, endpoint: str) -> None:
    """Do what HF_ENDPOINT does before the import."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "README.md").write_text("nothing")
    with small_hub({"somebody/model": published, "somebody/gated": published, "somebody/data": bare}) as hub:
        hub.gated.add("somebody/gated")
        at(monkeypatch, hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield hub


def test_a_model_is_fetched_once_and_no_more_of_it_than_is_read(hub, published):
    folder = find_model("somebody/model")
    assert folder.name == COMMIT
    names = {str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == names - {*STRANGERS}
    assert (folder / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    fetched = len(hub.fetched)
    assert find_model("somebody/model") == find_model("somebody/model", "v1") == folder
    assert len(hub.fetched) == fetched


def test_folders_and_bundled_models_ask_no_hub(hub, random_folder):
    assert find_model(random_folder) == find_model(str(random_folder)) == random_folder
    assert find_model("astraea-tiny") == BUNDLED / "astraea-tiny"
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("somebody/nothing", None, "there is no such model, or it is private"),
        ("somebody/model", "v9", "it has no revision 'v9'"),
        ("somebody/gated", None, "its authors must grant access first"),
        ("somebody/data", None, "has no config.json"),
        ("/no/such/folder", None, "is neither a folder"),
        ("three/part/name", None, "is neither a folder"),
        ("../model", None, "is neither a folder"),
        ("nobody", None, "is neither a folder"),
        ("astraea-tiny", "v1", "is a folder here"),
    ],
)
def test_what_cannot_be_found_says_why(model, revision, words, hub):
    with pytest.raises(CheckpointError, match=words) as raised:
        find_model(model, revision)
    assert "\n" not in str(raised.value)


def test_without_the_hub_the_cache_serves(hub, monkeypatch):
    folder = find_model("somebody/model")
    at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        find_model("somebody/other")
    assert find_model("somebody/model") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("somebody/model") == folder
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        find_model("somebody/other")


def test_the_command_fetches_with_the_variables_of_the_hub(published, tmp_path):
    """HF_ENDPOINT and HF_HOME are what they are for every tool of the hub."""
    with small_hub({"somebody/model": published}) as hub:
        command = [Path(sys.executable).with_name("astraea-jax"), "convert", "somebody/model", "out", "--revision=v1"]
        variables = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Fetching" in done.stderr
    assert "written: out" in done.stderr
    assert (tmp_path / "home" / "hub" / "models--somebody--model" / "snapshots" / COMMIT).is_dir()
    assert (tmp_path / "out" / "orbax").is_dir()
