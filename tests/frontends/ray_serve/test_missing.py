"""Without Ray, whoever asks for it is told what to install."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_one_sentence_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("astraea_jax.frontends.ray_serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module("astraea_jax.frontends.ray_serve")
    assert str(caught.value) == "astraea_jax.frontends.ray_serve needs Ray Serve: pip install 'astraea-jax[ray]'"
