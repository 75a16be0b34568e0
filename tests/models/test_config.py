"""Configurations are read as transformers writes them; what is not served is refused by name."""

from __future__ import annotations

import math

import pytest

from astraea_jax.models.config import CheckpointError
from astraea_jax.models.config_file import read_json
from astraea_jax.models.families import read_config, to_hf
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.published_fields import FIELDS
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


LIKE_LLAMA = ("mistral-small-24b", "phi-4")
"""Published models of other families that differ in no switch."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_survive_the_way_there_and_back(name):
    if PUBLISHED[name].experts or (name in FIELDS and name not in LIKE_LLAMA):
        with pytest.raises(CheckpointError, match=r"only Llama, .* use Orbax"):
            to_hf(PUBLISHED[name])
    else:
        assert read_config(to_hf(PUBLISHED[name])) == PUBLISHED[name]


SIZES = {
    "mistral-7b-v0.1": 7.24,
    "mistral-small-24b": 23.6,
    "ministral-3-8b": 8.5,
    "devstral-small-2-24b": 23.6,
    "devstral-2-123b": 125,
    "phi-4": 14.7,
    "phi-4-mini": 3.8,
    "gemma-2-9b": 9.24,
    "gemma-3-1b": 1.0,
    "gemma-3-4b": 3.9,
    "gemma-3-27b": 27,
    "qwen3-30b-a3b": 30.5,
    "qwen3-coder-30b-a3b": 30.5,
    "qwen3-coder-480b-a35b": 480,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "glm-4.5-air": 106,
    "glm-4.5": 353,
}
"""Billions of parameters, as published; of Gemma 3 without what sees pictures, of GLM without the layer that predicts
further tokens."""
ACTIVE = {"qwen3-coder-30b-a3b": 3.3, "gpt-oss-20b": 3.6, "gpt-oss-120b": 5.1, "glm-4.5-air": 12, "glm-4.5": 32}
"""The same for those that one token meets."""


@pytest.mark.parametrize("name", FIELDS)
def test_published_shapes_have_the_published_size(name):
    model = PUBLISHED[name]
    assert (model.layer_weights + model.table_weights) / 1e9 == pytest.approx(SIZES[name], rel=0.03)
    if name in ACTIVE:
        head = model.vocab_size * model.hidden_size
        assert (model.active_weights + head) / 1e9 == pytest.approx(ACTIVE[name], rel=0.1)


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
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "'dynamic' is not served; .*yarn, longrope",
        ),
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


def published(name, *without, **change):
    """The configuration of a published model, changed."""
    return read_config({field: value for field, value in {**FIELDS[name], **change}.items() if field not in without})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mistral-7b-v0.1", {"sliding_window": 0}, "sliding_window is 0; a positive integer"),
        ("mistral-7b-v0.1", {"sliding_window": 8, "layer_types": ["full_attention"] * 32}, "layer_types are not what"),
        (
            "mistral-7b-v0.1",
            {"use_sliding_window": False},
            "sliding_window is 4096, but use_sliding_window is not true",
        ),
        (
            "mistral-7b-v0.1",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "llama_4_scaling_beta": 0.1}},
            "Ministral3",
        ),
        ("mistral-7b-v0.1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("gemma-3-4b", {"layer_types": ["sliding_attention"]}, "each of the 34 layers"),
        ("gemma-3-4b", {"layer_types": ["chunked_attention"] * 34}, "layer_types chunked_attention are not served"),
        ("gemma-3-4b", {"sliding_window": None}, "sliding_window is None"),
        ("gemma-3-4b", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma-3-4b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50"),
        ("gemma-3-4b", {"hidden_activation": "relu"}, "hidden_activation = 'relu'"),
        ("gemma-3-4b", {"rope_parameters": {"rope_type": "default"}}, "an object for full_attention and sliding"),
        ("gemma-3-4b", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        (
            "phi-4-mini",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48}},
            "long_factor must be a list of 48",
        ),
        ("phi-4-mini", {"partial_rotary_factor": 0.71}, "rotates 90 of 128|must be a list of 45"),
        ("phi-4-mini", {"partial_rotary_factor": 0.01}, "rotates 1 of 128"),
        ("phi-4-mini", {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ("phi-4-mini", {"original_max_position_embeddings": 1}, "must be greater than 1"),
        ("ministral-3-8b", {"rope_parameters": {"type": "yarn", "factor": 4.0, "beta_fast": 1.0}}, "beta_fast"),
        ("ministral-3-8b", {"rope_parameters": {"type": "yarn", "factor": 4.0, "rope_theta": 1.0}}, "greater than 1"),
        ("ministral-3-8b", {"rope_parameters": {"type": "yarn", "factor": 0.0}}, "factor is 0.0"),
        ("ministral-3-8b", {"rope_parameters": {"type": "mrope"}}, "'mrope' is not served"),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, "num_experts_per_tok is 129; there are 128 experts"),
        ("qwen3-30b-a3b", {"num_experts": 2**20}, "there are 1048576 experts; at most 4096"),
        ("qwen3-30b-a3b", {"mlp_only_layers": "all"}, "mlp_only_layers is 'all'"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("gpt-oss-20b", {"swiglu_alpha": 1.5}, "swiglu_alpha = 1.5"),
        ("gpt-oss-20b", {"swiglu_limit": -1}, "swiglu_limit is -1"),
        ("gpt-oss-20b", {"swiglu_limit": None}, "swiglu_limit is None; a positive number is needed"),
        ("glm-4.5", {"n_group": 1, "topk_group": 2}, "cannot be chosen from 2 of 1 groups"),
        ("glm-4.5", {"n_group": 3, "topk_group": 1}, "cannot be chosen from 1 of 3 groups"),
        ("glm-4.5", {"n_group": 80, "topk_group": 2}, "cannot be chosen from 2 of 80 groups"),
        ("glm-4.5", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
    ],
)
def test_what_is_not_served_of_other_families_is_named(name, change, words):
    with pytest.raises(CheckpointError, match=words):
        published(name, **change)


def test_windows_of_other_families():
    assert published("mistral-7b-v0.1").sliding == tuple(range(32))
    assert published("mistral-7b-v0.1", "sliding_window").window == 4096  # the class says so
    assert published("mistral-7b-v0.1", sliding_window=None).sliding == ()
    assert published("mistral-7b-v0.1", sliding_window=32_768).sliding == ()  # hides nothing
    assert published("gemma-3-1b").sliding == tuple(i for i in range(26) if i % 6 != 5)
    assert published("gemma-3-1b", sliding_window=40_000).sliding != ()  # such layers have another rotary embedding
    assert published("gpt-oss-20b").sliding == tuple(range(0, 24, 2))
    assert published("gpt-oss-20b", layer_types=["full_attention"] * 24).sliding == ()
    assert published("qwen3-30b-a3b", use_sliding_window=True, sliding_window=64).sliding == tuple(range(48))
    qwen = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64}
    assert read_config({**qwen, "max_window_layers": 30}).sliding == (30, 31)


def test_longrope_is_that_of_the_longest_context():
    factors = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    fields = {**FIELDS["phi-4-mini"], "rope_scaling": {**factors, "type": "longrope"}}
    for room, long in ((None, True), (4096, False), (4097, True)):
        scaling = read_config(fields, max_context=room).rope.scaling
        assert scaling.long is long
        assert scaling.factors[0] == (2.0 if long else 1.0)
        assert scaling.magnitude == pytest.approx((1 + math.log(32) / math.log(4096)) ** 0.5)
    assert read_config({**fields, "rope_scaling": factors}).rope.scaling.long


def test_magnitudes_of_yarn():
    def magnitude(**more):
        rope = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, **more}
        return published("ministral-3-8b", rope_parameters=rope).rope.scaling.magnitude

    assert magnitude() == magnitude(mscale=1.0, mscale_all_dim=0) == pytest.approx(0.1 * math.log(16) + 1)
    assert magnitude(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert magnitude(attention_factor=1.25) == 1.25
    assert magnitude(factor=0.5) == 1.0


def test_text_parts_of_models_that_see_pictures():
    text = {**FIELDS["gemma-3-4b"], "model_type": "gemma3_text"}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    assert read_config(config) == PUBLISHED["gemma-3-4b"]
    devstral = {**FIELDS["devstral-small-2-24b"], "model_type": "ministral3"}
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": devstral}
    assert read_config({**config, "tie_word_embeddings": False}) == PUBLISHED["devstral-small-2-24b"]
    with pytest.raises(CheckpointError, match=r"text_config\.model_type mistral or ministral3, not 'mistral4'"):
        read_config({**config, "text_config": {"model_type": "mistral4"}})
    with pytest.raises(CheckpointError, match="text_config is 5"):
        read_config({**config, "text_config": 5})
