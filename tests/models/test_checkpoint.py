"""Weights survive every way in and out; damaged folders are refused with the cause."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.decoders import assert_same, flat

from astraea_jax.models import CheckpointError, resolve
from astraea_jax.models.checkpoint import (
    copy_beside,
    load,
    load_hf,
    random_decoder,
    save_hf,
    save_orbax,
)
from astraea_jax.models.config import ModelConfig

CONFIG = ModelConfig(64, 32, 48, 2, 4, 2, 16, 128, qkv_bias=True)


@pytest.fixture
def decoder():
    return random_decoder(CONFIG, jnp.float32, seed=0)


@pytest.fixture
def folder(decoder, tmp_path):
    save_hf(decoder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_there_and_back(dtype, tied, tmp_path):
    decoder = random_decoder(dataclasses.replace(CONFIG, tie_embeddings=tied), dtype, seed=1)
    save_hf(decoder, tmp_path / "hf")
    assert_same(load(tmp_path / "hf", dtype), decoder)
    save_orbax(decoder, tmp_path / "orbax")
    assert_same(load(tmp_path / "orbax", dtype), decoder)


def test_conversion_by_the_script(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    for source, target, kind in ((folder, tmp_path / "o", "orbax"), (tmp_path / "o", tmp_path / "h", "hf")):
        command = [sys.executable, "scripts/convert_checkpoint.py", f"--source={source}", f"--target={target}"]
        subprocess.run([*command, f"--to={kind}", "--dtype=float32"], check=True, capture_output=True)
    assert (tmp_path / "h" / "tokenizer.json").read_text() == "{}"
    assert_same(load(tmp_path / "h", jnp.float32), load(folder, jnp.float32))


def test_progress_ends_at_the_total(folder):
    seen = []
    load_hf(folder, jnp.bfloat16, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_wide_file_is_cast(folder):
    assert {x.dtype for x in jax.tree.leaves(nnx.state(load_hf(folder, jnp.bfloat16)))} == {jnp.dtype("bfloat16")}


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def tied_folder(tmp_path):
    """A tied model has no head of its own."""
    save_hf(random_decoder(dataclasses.replace(CONFIG, tie_embeddings=True), jnp.float32, seed=0), tmp_path / "tied")
    return tmp_path / "tied"


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_an_own_head_of_a_tied_model_is_used(tied_folder, caplog):
    """transformers 5 does the same, and warns, too."""
    rewrite(tied_folder, lambda t: t.update({HEAD: t[EMBEDDING][::-1].copy()}))
    decoder = load(tied_folder, jnp.float32)
    assert not decoder.config.tie_embeddings
    np.testing.assert_array_equal(decoder.lm_head.weight[...].T, decoder.embed.weight[...][::-1])
    assert "lm_head.weight differs" in caplog.text


def test_an_equal_head_stays_tied(tied_folder):
    expected = load(tied_folder, jnp.bfloat16)
    rewrite(tied_folder, lambda t: t.update({HEAD: t[EMBEDDING] * np.float32(1 + 2**-20)}))  # the same once it is cast
    decoder = load(tied_folder, jnp.bfloat16)
    assert decoder.config.tie_embeddings
    assert_same(decoder, expected)


def test_a_head_stands_in_for_a_missing_embedding(tied_folder):
    expected = load(tied_folder, jnp.float32)
    rewrite(tied_folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    assert_same(load(tied_folder, jnp.float32), expected)


@pytest.mark.parametrize("dtypes", [("float8_e4m3fn", "float8_e5m2"), ("bfloat16", "float16", "float64", "float32")])
def test_several_dtypes_in_one_file_are_cast(dtypes, folder):
    def stored(tensors):
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].astype(dtypes[i % len(dtypes)])

    def rounded(tensors):
        stored(tensors)
        for name in tensors:
            tensors[name] = tensors[name].astype("float32")

    original = load_file(folder / "model.safetensors")
    rewrite(folder, rounded)
    expected = load(folder, jnp.float32)
    save_file(original, folder / "model.safetensors")
    rewrite(folder, stored)
    assert_same(load(folder, jnp.float32), expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool", "int64"])
def test_numbers_that_are_no_weights(dtype, folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({name: t[name].astype(dtype)}))
    with pytest.raises(CheckpointError, match=rf"tensor {name} in .*model\.safetensors has dtype (I8|U8|BOOL|I64)"):
        load(folder, jnp.float32)


def test_what_is_loaded_does_not_change_with_the_file(folder):
    decoder = load(folder, jnp.float32)
    expected = flat(decoder)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    for name, array in flat(decoder).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_missing_tensor(folder):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, jnp.float32)


def test_wrong_shape_names_both(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": np.zeros(7, np.float32)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(7,\); config\.json makes it \(32,\)"):
        load(folder, jnp.float32)


def test_tensors_nobody_asked_for(folder):
    rewrite(folder, lambda t: t.update({"model.rotary_emb.inv_freq": np.zeros(8, np.float32)}))
    load(folder, jnp.float32)
    rewrite(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), np.float32)}))
    with pytest.raises(CheckpointError, match=r"does not account for: model\.layers\.2"):
        load(folder, jnp.float32)


def test_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load(folder, jnp.float32)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        load(folder, jnp.float32)


def test_a_missing_shard_and_one_outside_the_folder(folder):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = list(load_file(folder / "model-1.safetensors"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    load(folder, jnp.float32)
    index.write_text(json.dumps({"weight_map": {names[0]: "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks model-2\.safetensors"):
        load(folder, jnp.float32)
    for bad in ("../model-1.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {names[0]: bad}}))
        with pytest.raises(CheckpointError, match="its own folder"):
            load(folder, jnp.float32)


def test_damaged_orbax(decoder, tmp_path):
    save_orbax(decoder, tmp_path)
    other = {**json.loads((tmp_path / "config.json").read_text()), "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="does not fit"):
        load(tmp_path, jnp.float32)


def test_unknown_models_list_the_bundled():
    with pytest.raises(CheckpointError, match=r"'no-such-model' is neither.*astraea-tiny"):
        resolve("no-such-model")


def test_copying_leaves_what_is_there(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("x")
    named = folder / "additional_chat_templates" / "tool_use.jinja"
    named.parent.mkdir()
    named.write_text("z")
    target = tmp_path / "target"
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").write_text("y")
    copy_beside(folder, target)
    assert (target / "chat_template.jinja").read_text() == "y"
    copy_beside(folder, tmp_path)
    assert (tmp_path / named.relative_to(folder)).read_text() == "z"


PEAK = """
import re, sys
import jax, jax.numpy as jnp
from pathlib import Path
from astraea_jax.models.checkpoint import load_hf
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
jnp.zeros(1).block_until_ready()
before = peak()
decoder = load_hf(Path(sys.argv[1]), jnp.float32)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc: getrusage() counts what the parent has held, too")
def test_peak_memory_stays_near_one_copy(tmp_path):
    config = ModelConfig(8000, 1024, 2048, 4, 8, 8, 128, 128)
    decoder = random_decoder(config, jnp.float32, seed=0)
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(decoder)))
    save_hf(decoder, tmp_path)
    del decoder
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], check=True, capture_output=True, text=True)
    grown = int(done.stdout) * 1024
    # One copy of arrays, one of the file's pages that are mapped in, a tensor, and the holes that malloc leaves.
    assert 1.5 * size < grown < 2.7 * size, f"{grown / size:.2f} copies"
