"""Configurations are read as transformers writes them; what is not served is refused by name."""

from __future__ import annotations

import pytest

from astraea_jax.models.config import PUBLISHED, CheckpointError, ModelConfig, RopeScaling, read_json

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_survive_the_way_there_and_back(name):
    assert ModelConfig.from_hf(PUBLISHED[name].to_hf()) == PUBLISHED[name]


def test_transformers_4_and_5_spell_the_rope_differently():
    new = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500_000.0}
    assert ModelConfig.from_hf(LLAMA) == ModelConfig.from_hf(new) == PUBLISHED["llama-3.1-8b"]
    assert PUBLISHED["llama-3.1-8b"].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not served.*LlamaForCausalLM"),
        ({"architectures": None}, "None is not served"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"num_key_value_heads": 5}, "32 heads on 5 KV heads"),
    ],
)
def test_what_is_not_served_is_named(change, words):
    with pytest.raises(CheckpointError, match=words):
        ModelConfig.from_hf({**LLAMA, **change})


def test_files_that_are_no_json_objects(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="missing"):
        read_json(path)
    assert read_json(path, missing={}) == {}
    for text in ("{", "[1]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_json(path)
