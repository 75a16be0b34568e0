"""Folders as others write them, read here and by transformers: texts, tokens, configurations, logits are the same."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.parity import check_logits
from support.reading import VARIANTS, answers, change, check

from astraea_jax.models.checkpoint import random_decoder, save_hf
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.config_file import read_json
from astraea_jax.models.families import read_config, to_hf

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to turn into errors
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_tokenizers_and_templates(variant, tmp_path):
    check(variant, tmp_path / "model", answers(variant, tmp_path / "model"))


MODEL = ModelConfig(160, 32, 48, 2, 4, 2, 8, 256)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DELETED = object()
CONFIGS = {
    "rope_scaling beside rope_parameters": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
    "rope_scaling without a theta beside one with": {
        "rope_theta": DELETED,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
    },
    "rope_scaling null": {"rope_scaling": None},
    "older name of rope_type": {"rope_parameters": DELETED, "rope_scaling": {**LLAMA3, "type": "llama3"}},
    "no original_max_position_embeddings": {"rope_scaling": LLAMA3},
    "original_max_position_embeddings outside": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 64,
    },
    "no theta": {"rope_theta": DELETED, "rope_parameters": DELETED},
    "no rope_parameters": {"rope_parameters": DELETED},
    "theta twice": {"rope_theta": 777.0},
    "swish": {"hidden_act": "swish"},
    "no activation": {"hidden_act": DELETED},
    "window flags without effect": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    "window for no layer": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "window null": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "all layers full": {"layer_types": ["full_attention"] * 2, "sliding_window": None},
    "many fields missing": dict.fromkeys(
        ("head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"), DELETED
    ),
    "kv heads null": {"num_key_value_heads": None, "head_dim": 8},
    "attention_bias null": {"attention_dropout": 0.1},
    "dtype": {"torch_dtype": "bfloat16", "dtype": DELETED},
    "no architectures": {"architectures": DELETED},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_configurations(family, name, tmp_path):
    import transformers

    written = {**to_hf(MODEL), "model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"]}
    if family == "qwen3":
        written["hidden_size"] = 64
    changed = {key: value for key, value in {**written, **CONFIGS[name]}.items() if value is not DELETED}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs.standardize_rope_params()  # as their models do
    ours = read_config(read_json(tmp_path / "config.json"))
    rope = theirs.rope_parameters
    assert set(getattr(theirs, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == rope["rope_theta"]
    assert ("default" if ours.rope.scaling is None else "llama3") == rope["rope_type"]
    if ours.rope.scaling is not None:
        assert ours.rope.scaling.original_max_position == rope["original_max_position_embeddings"]
        assert ours.rope.scaling.factor == rope["factor"]


def with_own_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()


def with_equal_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()


def with_head_only(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def with_several_dtypes(tensors):
    for i, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].astype([jnp.bfloat16, "float64", "float16", "float32"][i % 4])


def with_8_bit_floats(tensors):
    for i, name in enumerate(sorted(tensors)):
        if name.endswith("proj.weight"):
            tensors[name] = tensors[name].astype([jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16][i % 3])


WEIGHTS = [with_own_head, with_equal_head, with_head_only, with_several_dtypes, with_8_bit_floats]


@pytest.mark.parametrize("alter", WEIGHTS, ids=lambda alter: alter.__name__)
def test_logits(alter, tmp_path):
    import torch
    import transformers

    config = ModelConfig(160, 32, 48, 2, 4, 2, 8, 256, tie_embeddings=True)
    save_hf(random_decoder(config, jnp.float32, seed=3), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    alter(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change(tmp_path / "config.json", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompt = np.random.default_rng(0).integers(160, size=40).astype(np.int32)
    with torch.inference_mode():
        logits = model(torch.tensor(prompt[None].astype(np.int64))).logits[0].numpy()
    np.savez(tmp_path / "golden.npz", prompt=prompt, logits=logits)
    check_logits(tmp_path)
