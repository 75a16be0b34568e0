"""Shapes and constants of decoders: read from a Hugging Face ``config.json``, or published ones by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

MAX_LAYERS = 1024
"""Far more than any model has; a mistyped number is refused before a decoder of that size is built."""

Json = Mapping[str, Any]


class CheckpointError(ValueError):
    """A checkpoint folder cannot be served; the message names the cause and what to do."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling of the rotary embedding (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes one layer of a model from another."""

    window: int | None
    """Keys that a query sees, its own included; None: all."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a decoder: Llama 3.x, Qwen2.5 or Qwen3 (dense)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    """Qwen2.5 adds a bias to the query, key and value projections."""
    qk_norm: bool = False
    """Qwen3 normalises every query and key head before the rotary embedding."""
    window: int | None = None
    """Keys that a query sees in the layers of ``sliding``, its own included."""
    sliding: tuple[int, ...] = ()
    """Layers with a window."""

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(LayerKind(self.window if i in self.sliding else None) for i in range(self.num_layers))

    @classmethod
    def from_hf(cls, config: Json) -> ModelConfig:
        """Read a Hugging Face configuration, as transformers 4 or 5 writes it.

        Raises:
            CheckpointError: unknown architecture, a feature that is not served, or a missing or absurd field.
        """
        architecture = _architecture(config)
        _refuse_unserved(config, architecture)
        llama = architecture == "LlamaForCausalLM"
        heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
        kv_heads = _size(config, "num_key_value_heads", heads if llama or "num_key_value_heads" in config else 32)
        head_dim = _size(config, "head_dim", 128 if architecture == "Qwen3ForCausalLM" else max(hidden // heads, 1))
        if heads % kv_heads or head_dim % 2:
            raise CheckpointError(f"{heads} heads on {kv_heads} KV heads of size {head_dim} make no grouped attention")
        max_position = _size(config, "max_position_embeddings", 2048 if llama else 32_768)
        theta, scaling = _rope(config, max_position)
        return cls(
            vocab_size=_size(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=_layers(config),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position=max_position,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_eps=_number(config, "rms_norm_eps", 1e-6),
            tie_embeddings=_flag(config, "tie_word_embeddings"),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
        )

    @property
    def ffn_block(self) -> int:
        """Consecutive features of gate or up projection in the matrix that joins them.

        It is 128, the lanes of a TPU, or the largest divisor that fits each device's share in any mesh that divides the
        model.
        """
        return math.gcd(self.intermediate_size // math.gcd(self.intermediate_size, self.num_kv_heads), 128)

    @property
    def layer_weights(self) -> int:
        """Number of weights in the matrices of all layers."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def table_weights(self) -> int:
        """Number of weights in the embedding and the output projection, which may be the same matrix."""
        return (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size

    def to_hf(self) -> dict[str, Any]:
        """Write it as the fields of a Hugging Face ``config.json``."""
        architecture = ARCHITECTURES[1 if self.qkv_bias else 2 if self.qk_norm else 0]
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = {"rope_type": "llama3", **asdict(self.rope_scaling)}
            rope["original_max_position_embeddings"] = rope.pop("original_max_position")
        return {
            "architectures": [architecture],
            "model_type": architecture.removesuffix("ForCausalLM").lower(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_theta,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "rms_norm_eps": self.rms_eps,
            "tie_word_embeddings": self.tie_embeddings,
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
    layers = _layers(config)
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or not all(isinstance(name, str) for name in types):
            raise CheckpointError(f"config.json: layer_types must name the type of each of the {layers} layers")
        return any(name != "full_attention" for name in types)
    if not _flag(config, "use_sliding_window") or config.get("sliding_window", 4096) is None:
        return False
    full = config.get("max_window_layers", 28)
    if isinstance(full, bool) or not isinstance(full, int) or full < 0:
        raise CheckpointError(f"config.json: max_window_layers is {full!r}; a number of layers is needed")
    return full < layers and _size(config, "sliding_window", 4096) < _size(config, "max_position_embeddings", 32_768)


def _layers(config: Json) -> int:
    layers = _size(config, "num_hidden_layers")
    if layers > MAX_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers is {layers}; at most {MAX_LAYERS} are served")
    return layers


def _size(config: Json, field: str, default: int | None = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
        raise CheckpointError(f"config.json: {field} is {value!r}; a positive integer is needed")
    return value


def _number(config: Json, field: str, default: float | None = None) -> float:
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CheckpointError(f"config.json: {field} is {value!r}; a positive number is needed")
    return float(value)


def _flag(config: Json, field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {field} is {value!r}; true or false is needed")
    return bool(value)


def _rope(config: Json, max_position: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding; ``rope_scaling`` wins over ``rope_parameters``, as in transformers."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"config.json: rope parameters are {rope!r}; one object for all layers is served")
    theta = _number({"rope_theta": config.get("rope_theta", 10_000.0), **rope}, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"rope_type {kind!r} is not served; 'default' and 'llama3' are")
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) not in (1.0, None):
        raise CheckpointError(f"partial_rotary_factor = {partial!r} is not served, only 1.0")
    if kind == "default":
        return theta, None
    original = "original_max_position_embeddings"  # beside the rope parameters it wins over one within
    scaling = RopeScaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position=_size(config if original in config else rope, original, max_position),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError("config.json: high_freq_factor of the rope must be greater than low_freq_factor")
    return theta, scaling


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a checkpoint folder; ``missing`` stands in for a file that is not there.

    Raises:
        CheckpointError: the file is missing and may not be, or is no JSON object.
    """
    if not path.is_file():
        if missing is None:
            raise CheckpointError(f"{path} is missing; is this a Hugging Face checkpoint folder?")
        return missing
    text = read_text(path)
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def read_text(path: Path) -> str:
    """A text file from a checkpoint folder, in UTF-8 whatever the locale.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _llama(hidden: int, inner: int, layers: int, heads: int, head_dim: int, factor: float, tied: bool) -> ModelConfig:
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    return ModelConfig(
        *(128_256, hidden, inner, layers, heads, 8, head_dim, 131_072, 500_000.0, scaling, 1e-5), tie_embeddings=tied
    )


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        151_936, hidden, inner, layers, heads, 8, 128, 40_960, 1_000_000.0, tie_embeddings=tied, qk_norm=True
    )


_QWEN25 = ModelConfig(151_936, 896, 4864, 24, 14, 2, 64, 32_768, 1_000_000.0, tie_embeddings=True, qkv_bias=True)

_SMOLLM2 = ModelConfig(49_152, 576, 1536, 30, 9, 3, 64, 8192, 100_000.0, tie_embeddings=True)

_TINY_32K = ModelConfig(517, 256, 1024, 2, 4, 2, 32, 32_768, 10_000.0, tie_embeddings=True)

PUBLISHED: dict[str, ModelConfig] = {
    "tiny-32k": _TINY_32K,
    "smollm2-135m": _SMOLLM2,
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, 128, 8.0, False),
    "llama-3.1-70b": _llama(8192, 28_672, 80, 64, 128, 8.0, False),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 64, 32.0, True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 128, 32.0, True),
    "qwen2.5-0.5b": _QWEN25,
    "qwen2.5-7b": replace(
        _QWEN25,
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        tie_embeddings=False,
    ),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12_288, 36, 32, False),
    "qwen3-32b": _qwen3(5120, 25_600, 64, 64, False),
}
"""Shapes as published, for benchmarks with random weights; and ``tiny-32k``, nobody's, for long contexts on a CPU."""
