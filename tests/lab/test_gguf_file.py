"""Weights for llama.cpp: what is written is read back by the library of their format."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.scripts import ROOT

from astraea_jax.models.checkpoint import random_decoder, save_hf
from astraea_jax.models.config import ModelConfig

MODEL = ModelConfig(48, 32, 64, 2, 4, 2, 8, 128, tie_embeddings=True)
KINDS = {
    "llama": MODEL,
    "qwen2": dataclasses.replace(MODEL, qkv_bias=True, tie_embeddings=False),
    "qwen3": dataclasses.replace(MODEL, qk_norm=True),
}


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    save_hf(random_decoder(KINDS[kind], jnp.float32, seed=0), tmp_path / "hf")
    file = tmp_path / "model.gguf"
    subprocess.run([sys.executable, "astraea_jax/lab/gguf_file.py", tmp_path / "hf", file], cwd=ROOT, check=True)
    read = gguf.GGUFReader(file)
    assert read.get_field("general.architecture").contents() == kind
    assert read.get_field(f"{kind}.attention.head_count_kv").contents() == 2
    assert len(read.get_field("tokenizer.ggml.tokens").contents()) == 48
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    original = load_file(tmp_path / "hf" / "model.safetensors")
    assert len(tensors) == len(original)
    np.testing.assert_array_equal(tensors["token_embd.weight"], original["model.embed_tokens.weight"])
    query, as_stored = tensors["blk.1.attn_q.weight"], original["model.layers.1.self_attn.q_proj.weight"]
    if kind == "llama":  # rows 0 and 4 of a head of 8 are rotated together; llama.cpp rotates rows 0 and 1
        np.testing.assert_array_equal(query.reshape(4, 8, 32)[:, :2], as_stored.reshape(4, 8, 32)[:, ::4])
    else:
        np.testing.assert_array_equal(query, as_stored)
