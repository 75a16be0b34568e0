"""Configurations are read as transformers writes them; what is not served is refused by name."""

from __future__ import annotations

import pytest

from astraea_jax.models.config import CheckpointError
from astraea_jax.models.config_file import read_json
from astraea_jax.models.families import read_config, to_hf
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.rope import Linear, Llama3

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
    assert read_config(to_hf(PUBLISHED[name])) == PUBLISHED[name]


def test_transformers_4_and_5_spell_the_rope_differently():
    new = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500_000.0}
    assert read_config(LLAMA) == read_config(new) == PUBLISHED["llama-3.1-8b"]
    assert PUBLISHED["llama-3.1-8b"].rope.scaling == Llama3(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not served.*LlamaForCausalLM"),
        ({"architectures": None}, "None is not served"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic' is not served; .*yarn, longrope"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is None"),
        ({"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "one object for all layers"),
        ({"rope_scaling": 8}, "rope parameters are 8"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"use_sliding_window": 1}, "use_sliding_window is 1"),
        ({"use_sliding_window": True, "sliding_window": "x", "max_window_layers": 1}, "sliding_window is 'x'"),
        ({"use_sliding_window": True, "max_window_layers": None}, "max_window_layers is None"),
        ({"layer_types": ["sliding_attention"] + 31 * ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "each of the 32 layers"),
        ({"architectures": 5}, "5 is not served"),
        ({"architectures": {}, "model_type": "llama"}, "{} is not served"),
        ({"architectures": None, "model_type": "mamba"}, "'mamba' is not served"),
        ({"num_hidden_layers": 2**20}, "at most 1024"),
        ({"hidden_act": None}, "hidden_act = None"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"num_key_value_heads": 5}, "32 heads on 5 KV heads"),
    ],
)
def test_what_is_not_served_is_named(change, words):
    with pytest.raises(CheckpointError, match=words):
        read_config({**LLAMA, **change})


FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def read(change, *without, architecture="LlamaForCausalLM"):
    config = {**LLAMA, "architectures": [architecture], **change}
    return read_config({name: value for name, value in config.items() if name not in without})


def test_rope_scaling_wins_over_rope_parameters():
    new = {"rope_type": "default", "rope_theta": 5e5}
    assert read({"rope_parameters": new}).rope.scaling == Llama3(8.0, 1.0, 4.0, 8192)
    assert read({"rope_parameters": new}, "rope_theta").rope.theta == 10_000.0  # that of rope_parameters goes with it
    assert read({"rope_parameters": new, "rope_scaling": None}, "rope_theta").rope.theta == 5e5
    assert read({"rope_parameters": new, "rope_scaling": {}}).rope.scaling is None
    assert read({"rope_parameters": new, "rope_scaling": {"type": "linear", "factor": 4.0}}).rope.scaling == Linear(4.0)


def test_original_context_of_the_rope():
    scaling = {**LLAMA["rope_scaling"]}
    assert read({"original_max_position_embeddings": 64}).rope.scaling.original_max_position == 64
    del scaling["original_max_position_embeddings"]
    assert read({"rope_scaling": scaling}).rope.scaling.original_max_position == 131_072


@pytest.mark.parametrize("architecture", FAMILIES)
def test_defaults_of_transformers(architecture):
    """Defaults are those of transformers 5.24 for each family."""
    llama, qwen3 = architecture == FAMILIES[0], architecture == FAMILIES[2]
    absent = ("rope_theta", "rope_scaling", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads")
    config = read({"num_attention_heads": 64}, *absent, "hidden_act", "tie_word_embeddings", architecture=architecture)
    assert (config.rope.theta, config.rms_eps, config.tie_embeddings) == (10_000.0, 1e-6, False)
    assert config.max_position == (2048 if llama else 32_768)
    assert config.num_kv_heads == (64 if llama else 32)
    assert config.head_dim == (128 if qwen3 else 64)
    assert read({"num_key_value_heads": None}, architecture=architecture).num_kv_heads == 32


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "swish"},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": None, "sliding_window": 8},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 32},
        {"use_sliding_window": True, "sliding_window": 131_072, "max_window_layers": 0},
        {"layer_types": ["full_attention"] * 32, "use_sliding_window": True, "max_window_layers": 0},
        {"architectures": None, "model_type": "llama"},
        {"attention_bias": None, "mlp_bias": False, "quantization_config": None, "attention_dropout": 0.1},
        {"partial_rotary_factor": 1.0, "rope_parameters": None},
    ],
)
def test_what_changes_nothing(change):
    assert read(change) == PUBLISHED["llama-3.1-8b"]


def test_files_that_are_no_json_objects(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match="missing"):
        read_json(path)
    assert read_json(path, missing={}) == {}
    for text in ("{", "[1]", "[" * 100_000, '{"a": "\\ud800"}', "\x00"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(path)
    path.write_text('\ufeff{"a": "é \\ud83d\\ude00"}', encoding="utf-8")
    assert read_json(path) == {"a": "é 😀"}
