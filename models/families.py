"""Families of decoders: what each ``config.json`` says, as transformers 4 or 5 writes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .config import CheckpointError, ModelConfig
from .config_file import Json, flag, layers, number, size
from .rope import Llama3, Rope

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def read_config(config: Json) -> ModelConfig:
    """Read a Hugging Face configuration, as transformers 4 or 5 writes it.

    Raises:
        CheckpointError: unknown architecture, a feature that is not served, or a missing or absurd field.
    """
    architecture = _architecture(config)
    _refuse_unserved(config, architecture)
    llama = architecture == "LlamaForCausalLM"
    heads, hidden = size(config, "num_attention_heads"), size(config, "hidden_size")
    kv_heads = size(config, "num_key_value_heads", heads if llama or "num_key_value_heads" in config else 32)
    head_dim = size(config, "head_dim", 128 if architecture == "Qwen3ForCausalLM" else max(hidden // heads, 1))
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(f"{heads} heads on {kv_heads} KV heads of size {head_dim} make no grouped attention")
    max_position = size(config, "max_position_embeddings", 2048 if llama else 32_768)
    return ModelConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "intermediate_size"),
        num_layers=layers(config),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rope=_rope(config, max_position),
        rms_eps=number(config, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(config, "tie_word_embeddings"),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Write a configuration of Llama, Qwen2.5 or Qwen3 (dense) as the fields of a Hugging Face ``config.json``."""
    architecture = ARCHITECTURES[1 if config.qkv_bias else 2 if config.qk_norm else 0]
    rope: dict[str, Any] = {"rope_type": "default"}
    if isinstance(config.rope.scaling, Llama3):
        rope = {"rope_type": "llama3", **asdict(config.rope.scaling)}
        rope["original_max_position_embeddings"] = rope.pop("original_max_position")
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope.theta,
        "rope_parameters": {**rope, "rope_theta": config.rope.theta},
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


def _architecture(config: Json) -> str:
    """The class of the model, or that of its ``model_type`` where none is named."""
    named, kind = config.get("architectures"), config.get("model_type")
    if named is None and isinstance(kind, str):
        named = [name for name in ARCHITECTURES if name.removesuffix("ForCausalLM").lower() == kind] or [kind]
    architecture = named[0] if isinstance(named, list) and named else named
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"architecture {architecture!r} is not served; these are: {', '.join(ARCHITECTURES)}")
    return str(architecture)


def _refuse_unserved(config: Json, architecture: str) -> None:
    served_fields: list[tuple[str, tuple[Any, ...]]] = [
        ("quantization_config", (None,)),
        ("hidden_act", ("silu", "swish")),
        ("mlp_bias", (False, None)),
    ]
    if architecture != "Qwen2ForCausalLM":  # it always has query, key and value biases
        served_fields.append(("attention_bias", (False, None)))
    for field, served in served_fields:
        value = config.get(field, served[0])
        if value not in served:
            raise CheckpointError(f"{field} = {value!r} is not served for {architecture}, only {served[0]!r}")
    if _slides(config):
        raise CheckpointError("layers with a sliding window (use_sliding_window, layer_types) are not served")


def _slides(config: Json) -> bool:
    """Whether any layer has a window that is narrower than the context, as Qwen's configurations say it."""
    count = layers(config)
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != count or not all(isinstance(name, str) for name in types):
            raise CheckpointError(f"config.json: layer_types must name the type of each of the {count} layers")
        return any(name != "full_attention" for name in types)
    if not flag(config, "use_sliding_window") or config.get("sliding_window", 4096) is None:
        return False
    full = config.get("max_window_layers", 28)
    if isinstance(full, bool) or not isinstance(full, int) or full < 0:
        raise CheckpointError(f"config.json: max_window_layers is {full!r}; a number of layers is needed")
    return full < count and size(config, "sliding_window", 4096) < size(config, "max_position_embeddings", 32_768)


def _rope(config: Json, max_position: int) -> Rope:
    """The rotary embedding; ``rope_scaling`` wins over ``rope_parameters``, as in transformers."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"config.json: rope parameters are {rope!r}; one object for all layers is served")
    theta = number({"rope_theta": config.get("rope_theta", 10_000.0), **rope}, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"rope_type {kind!r} is not served; 'default' and 'llama3' are")
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) not in (1.0, None):
        raise CheckpointError(f"partial_rotary_factor = {partial!r} is not served, only 1.0")
    if kind == "default":
        return Rope(theta)
    original = "original_max_position_embeddings"  # beside the rope parameters it wins over one within
    scaling = Llama3(
        factor=number(rope, "factor"),
        low_freq_factor=number(rope, "low_freq_factor"),
        high_freq_factor=number(rope, "high_freq_factor"),
        original_max_position=size(config if original in config else rope, original, max_position),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError("config.json: high_freq_factor of the rope must be greater than low_freq_factor")
    return Rope(theta, scaling)
