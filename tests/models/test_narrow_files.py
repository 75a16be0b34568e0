"""Checkpoints in fewer bits are read as the weights that they stand for, and take no more memory than their files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.narrow_writers import WRITERS, write_narrow

from astraea_jax.models.checkpoint import load, random_decoder, save_hf
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.matrix import Matrix
from astraea_jax.models.narrow import dequantized

CONFIG = ModelConfig(64, 64, 96, 2, 4, 2, 32, 128, qkv_bias=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    save_hf(random_decoder(CONFIG, jnp.float32, seed=0), folder)
    return folder


def matrices(decoder):
    """Every matrix by its path, in float32, and the forms that they have."""
    found, forms = {}, {}
    for path, node in nnx.iter_graph(decoder):
        if isinstance(node, Matrix):
            name = ".".join(map(str, path))
            found[name] = np.asarray(
                node.weight[...] if node.form is None else dequantized(node.codes, node.form, jnp.float32)
            )
            forms[name] = node.form
    return found, forms


def assert_reads(narrow, again):
    ours, forms = matrices(load(narrow, jnp.float32))
    theirs, _ = matrices(load(again, jnp.float32))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight, rtol=1e-6, atol=1e-7, err_msg=name)
    return forms


@pytest.mark.parametrize("name", WRITERS)
def test_weights_are_those_of_the_file(name, wide, tmp_path):
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", name)
    forms = assert_reads(tmp_path / "narrow", tmp_path / "again")
    kept = [path for path, form in forms.items() if form is not None]
    assert len(kept) == 4 * CONFIG.num_layers - ("-quantized" in name)
