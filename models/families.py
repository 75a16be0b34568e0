"""What each family's ``config.json`` says, as transformers 4 or 5 writes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .config import CheckpointError, ModelConfig
from .config_file import Json, flag, layers, number, part, size
from .family_table import ARCHITECTURES, COMPOSITES, FAMILIES, LLAMA, Family, Switches
from .rope import Llama3
from .rope_fields import ORIGINAL, Context, read_rope, rope_parameters, rope_parameters_by_type
from .window_fields import windows


def read_config(config: Json, max_context: int | None = None) -> ModelConfig:
    """Read a Hugging Face configuration, as transformers 4 or 5 writes it.

    Args:
        config: the file's fields.
        max_context: tokens of the longest context that will be served, on which some rotary embeddings depend; None:
            the model's limit.

    Raises:
        CheckpointError: unknown architecture, a feature that is not served, or a missing or absurd field.
    """
    family, own = _family(config)
    fields = {**family.defaults, **own}
    _refuse_unserved(fields, family)
    heads, hidden = size(fields, "num_attention_heads"), size(fields, "hidden_size")
    kv_heads = size(fields, "num_key_value_heads", heads)
    head_dim = size(fields, "head_dim", max(hidden // heads, 1))
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(f"{heads} heads on {kv_heads} KV heads of size {head_dim} make no grouped attention")
    max_position = size(fields, "max_position_embeddings")
    original = size(fields, ORIGINAL) if fields.get(ORIGINAL) is not None else None
    context = Context(head_dim, max_position, max_context or max_position, original, family.partial)
    count = layers(fields)
    shape: Switches = {
        "vocab_size": size(fields, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": size(fields, "intermediate_size"),
        "num_layers": count,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position": max_position,
        "rms_eps": number(fields, "rms_norm_eps"),
        "tie_embeddings": flag(fields, "tie_word_embeddings"),
    }
    ropes = _ropes(fields, family, context)
    window, sliding = windows(fields, family.slides, count, typed=family.typed)
    if window is not None and window >= max_position and "window_rope" not in ropes:
        window, sliding = None, ()  # it hides nothing
    if sliding and family is LLAMA:  # whose class knows no windows
        raise CheckpointError("layers with a sliding window (use_sliding_window, layer_types) are not served for Llama")
    return ModelConfig(**shape, **ropes, window=window, sliding=sliding, **family.switches(fields))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Write a configuration of Llama, Qwen2.5 or Qwen3 (dense) as the fields of a Hugging Face ``config.json``.

    Raises:
        CheckpointError: it is of another family.
    """
    architecture = tuple(FAMILIES)[1 if config.qkv_bias else 2 if config.qk_norm else 0]
    rope: dict[str, Any] = {"rope_type": "default"}
    if isinstance(config.rope.scaling, Llama3):
        rope = {"rope_type": "llama3", **asdict(config.rope.scaling)}
        rope["original_max_position_embeddings"] = rope.pop("original_max_position")
    fields = {
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
    if read_config(fields) != config:
        raise CheckpointError("only Llama, Qwen2.5 and Qwen3 (dense) can be written as Hugging Face folders; use Orbax")
    return fields


def _ropes(fields: Json, family: Family, context: Context) -> Switches:
    if family.ropes == "by type":
        full, sliding = rope_parameters_by_type(fields)
        return {"rope": read_rope(full, context), "window_rope": read_rope(sliding, context)}
    parameters = rope_parameters(fields, family.rope)
    found: Switches = {"rope": read_rope(parameters, context)}
    beta = parameters.get("llama_4_scaling_beta")
    if family.model_type == "ministral3" and beta not in (0, None):
        original = context.original or size(parameters, ORIGINAL, context.max_position)
        found["query_growth"] = number(parameters, "llama_4_scaling_beta"), original
    elif beta not in (0, None):
        raise CheckpointError(f"llama_4_scaling_beta = {beta!r} is served for Ministral3ForCausalLM only")
    return found


def _family(config: Json) -> tuple[Family, Json]:
    """The family, and the fields of its text decoder."""
    named, kind = config.get("architectures"), config.get("model_type")
    architecture = named[0] if isinstance(named, list) and named else named
    if isinstance(architecture, str) and architecture in COMPOSITES:
        return _text_part(config, architecture)
    for family in FAMILIES.values():
        if architecture == family.architecture or (architecture is None and kind == family.model_type):
            return family, config
    if architecture is None and isinstance(kind, str):
        architecture = kind
    raise CheckpointError(f"architecture {architecture!r} is not served; these are: {', '.join(ARCHITECTURES)}")


def _text_part(config: Json, architecture: str) -> tuple[Family, Json]:
    """The text decoder of a model that also sees pictures; whether it is tied is said outside of its fields."""
    text, served = part(config, "text_config"), COMPOSITES[architecture]
    kind = text.get("model_type", served[0])
    if kind not in served:
        raise CheckpointError(
            f"{architecture} is served with text_config.model_type {' or '.join(served)}, not {kind!r}"
        )
    outside = {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
    family = next(one for one in FAMILIES.values() if one.model_type == kind)
    return family, {**text, **outside}


def _refuse_unserved(fields: Json, family: Family) -> None:
    activations = ("silu", "swish") if family.activation == "hidden_act" else ("gelu_pytorch_tanh",)
    served_fields: list[tuple[str, tuple[Any, ...]]] = [
        (family.activation, activations),
        ("mlp_bias", (False, None)),
        ("use_bidirectional_attention", (False, None)),
        ("swiglu_alpha", (1.702, None)),
    ]
    if not family.biased:
        served_fields.append(("attention_bias", (False, None)))
    if family.model_type == "gemma3_text":
        served_fields.append(("attn_logit_softcapping", (None,)))
    for name, served in served_fields:
        value = fields.get(name, served[0])
        if value not in served:
            raise CheckpointError(f"{name} = {value!r} is not served for {family.architecture}, only {served[0]!r}")


def ignored_layers(config: Json) -> range:
    """Layers of a checkpoint beyond the decoder's, which predict further tokens (GLM-4.5, section 2.1)."""
    family, fields = _family(config)
    if family.model_type != "glm4_moe":
        return range(0)
    extra = fields.get("num_nextn_predict_layers", fields.get("num_mtp_layers", 1))
    count = layers(fields)
    return range(count, count + (extra if isinstance(extra, int) else 0))
