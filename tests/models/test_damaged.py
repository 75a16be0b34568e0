"""Whatever a field of a checkpoint's files holds, the folder is read or refused as a CheckpointError."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.damaged import damaged
from support.reading import TINY, change, copy_tiny

from astraea_jax.models.checkpoint import load, random_decoder, save_hf
from astraea_jax.models.config import CheckpointError, ModelConfig
from astraea_jax.models.families import read_config, to_hf
from astraea_jax.models.published_fields import FIELDS
from astraea_jax.models.tokenizer import Tokenizer

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
ODD = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 2, 3, 64, 2**24, 2**70, 0.5, float("nan"), float("inf")),
        *("", "x", "default", "float32", "\ud800", [], [1], ["x"], [[]], [None], {}, {"a": 1}, {"content": 5}),
    ]
)
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refused(read, *arguments):
    with contextlib.suppress(CheckpointError):
        read(*arguments)


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIG = to_hf(ModelConfig(64, 32, 48, 2, 4, 2, 16, 128)) | {
    "rope_scaling": {**ROPE, "original_max_position_embeddings": 64},
    "use_sliding_window": True,
    "sliding_window": 4096,
    "max_window_layers": 1,
    "layer_types": ["full_attention"] * 2,
    "quantization_config": None,
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "eos_token_id": [1, 2],
}


@fuzz
@given(damaged(CONFIG, ODD))
def test_configurations(config):
    read_or_refused(read_config, json.loads(json.dumps(config)))


MORE = {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2, "max_window_layers": 1}
WITHIN = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": FIELDS["gemma-3-4b"]}


@settings(fuzz, max_examples=300)
@given(st.sampled_from([*FIELDS]).flatmap(lambda name: damaged(FIELDS[name] | MORE, ODD)) | damaged(WITHIN, ODD))
def test_configurations_of_other_families(config):
    read_or_refused(read_config, json.loads(json.dumps(config)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "model"
    save_hf(random_decoder(ModelConfig(64, 32, 48, 2, 4, 2, 16, 128), jnp.float32, seed=0), folder)
    return folder


def parts_of(folder):
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


@settings(fuzz, max_examples=30)
@given(st.data())
def test_headers_of_weights(folder, data):
    check_damaged_header(folder, data)


@pytest.mark.parametrize("name", ["gptoss-sinks", "phi3-long-partial-tied", "qwen3moe-normed"])
@settings(fuzz, max_examples=15)
@given(data=st.data())
def test_headers_of_fused_weights(name, data, tmp_path):
    if not (tmp_path / "model").exists():
        shutil.copytree(GOLDENS / name, tmp_path / "model")
    check_damaged_header(tmp_path / "model", data)


def check_damaged_header(folder, data):
    """A folder with a damaged header is read or refused."""
    if not (folder / "whole").exists():
        (folder / "whole").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").write_bytes((folder / "whole").read_bytes())
    header, weights = parts_of(folder)
    odd = data.draw(
        damaged(header, ODD) | damaged({name: {"dtype": "F8_E8M0"} | entry for name, entry in header.items()}, ODD)
    )
    for entry in odd.values():
        if isinstance(entry, dict) and data.draw(st.integers(0, 9)) == 0:
            entry["dtype"] = data.draw(st.sampled_from(["F16", "BF16", "F8_E4M3", "I32", "U32", "C64", "F4", "I8"]))
    text = json.dumps(odd).encode()
    whole = len(text).to_bytes(8, "little") + text + weights
    (folder / "model.safetensors").write_bytes(whole[: data.draw(st.none() | st.integers(0, len(whole)))])
    read_or_refused(load, folder, jnp.float32)


@pytest.mark.parametrize("size", ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads"])
def test_sizes_beyond_the_file(size, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    change(tmp_path / "config.json", **{size: 2**24})
    with pytest.raises(CheckpointError):
        load(tmp_path, jnp.float32)


TOKENIZER_CONFIG = {
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "special": True},
    "additional_special_tokens": ["<a>", {"content": "<b>"}],
    "image_token": "<img>",
    "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
    "split_special_tokens": False,
}
LISTED = {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True, "lstrip": False}}}
FILES = {
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "special_tokens_map.json": {"pad_token": {"content": "<p>"}, "extra_special_tokens": ["<c>"]},
    "added_tokens.json": {"<new>": 517, "<newer>": 518},
    "generation_config.json": {"eos_token_id": [0, 2]},
    "tokenizer.json": {
        name: value for name, value in json.loads((TINY / "tokenizer.json").read_text()).items() if name != "model"
    },
}


def use(folder):
    tokenizer = Tokenizer.from_folder(folder)
    with contextlib.suppress(ValueError):  # from templates that fail
        tokenizer.decode(tokenizer.encode("hello <|im_end|>", add_bos=True))
        tokenizer.encode_chat([{"role": "user", "content": "a<|im_end|>b"}])


@pytest.mark.parametrize("name", FILES)
@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_files_of_the_tokenizer(name, tmp_path, data):
    folder = tmp_path / "model"
    if not folder.exists():
        copy_tiny(folder)
        (folder / "chat_template.jinja").unlink()
    files = copy.deepcopy(FILES)
    if name == "tokenizer_config.json":
        files[name] |= data.draw(st.sampled_from([{}, LISTED]))
    files[name] = data.draw(damaged(files[name], ODD))
    for other, fields in files.items():
        if other != "tokenizer.json":
            (folder / other).write_text(json.dumps(fields))
    change(folder / "tokenizer.json", **FILES["tokenizer.json"] | files["tokenizer.json"])
    read_or_refused(use, folder)
