"""What ``quantization_config`` of a ``config.json`` says, and which tensors of the files it makes one weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .config import CheckpointError
from .config_file import Json
from .narrow_files import NarrowTensor, awq, float8, gptq, mxfp4, packed_words
from .safetensors_files import StoredTensor

COMPRESSED = (
    *("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision", "dense", None),
)
"""Values of ``format`` in files of compressed-tensors."""

Tensors = Mapping[str, StoredTensor]
Stored = dict[str, StoredTensor | NarrowTensor]
Make = Callable[[str, Tensors], NarrowTensor | None]
"""``make(module, tensors)``: the weight of a module; None: it has none in fewer bits."""

BESIDE = ("input_scale", "input_zero_point", "activation_scale", "weight_shape", "g_idx", "weight_g_idx")
"""Tensors beside those that make up a weight: scales of activations, which are not quantized here, and the like."""
SERVED = (
    "fp8 (blocks or tensors), compressed-tensors (float-quantized, int-quantized, pack-quantized of 4 and 8 bits), "
    "awq (gemm, 4 bits), gptq (4 and 8 bits) and mxfp4 are"
)


def narrowed(config: Json, tensors: dict[str, StoredTensor]) -> Stored:
    """The tensors of a folder, those of each quantized weight as one.

    Which weights these are is seen from the tensors.

    Raises:
        CheckpointError: a variant that is not served, or tensors that do not make up a weight.
    """
    fields = config.get("quantization_config")
    if fields is None and isinstance(text := config.get("text_config"), dict):
        fields = text.get("quantization_config")
    if fields is None:
        return dict(tensors)
    if not isinstance(fields, dict):
        raise CheckpointError(f"config.json: quantization_config is {fields!r}; an object is needed")
    method = fields.get("quant_method", "compressed-tensors" if "config_groups" in fields else None)
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise CheckpointError(f"quant_method = {method!r} is not served; {SERVED}")
    main, make = reader(fields)
    found: Stored = dict(tensors)
    for name in tensors:
        module, suffix = next(((name.removesuffix(end), end) for end in main if name.endswith(end)), (name, ""))
        weight = make(module, tensors) if suffix else None
        if weight is not None:
            for part in (*main, *COMPANIONS, *(f".{end}" for end in BESIDE)):
                found.pop(module + part, None)
            found[weight.name] = weight
    return found


COMPANIONS = (".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".qzeros", ".scales", "_scales")
"""Ends of names of tensors that make up a weight with the main one."""


def _float8(fields: Json) -> tuple[tuple[str, ...], Make]:
    _only(fields, "activation_scheme", ("dynamic", "static", None))
    _only(fields, "fmt", ("e4m3", "float8_e4m3fn", None))
    _only(fields, "scale_fmt", ("ue8m0", "float", None))
    blocks = [_pair(fields["weight_block_size"])] if fields.get("weight_block_size") is not None else []
    return (".weight",), lambda module, tensors: _scaled(module, tensors, ("F8_E4M3",), blocks)


def _compressed(fields: Json) -> tuple[tuple[str, ...], Make]:
    _only(fields, "format", COMPRESSED)
    _only(fields, "quantization_status", ("compressed", "frozen", None))
    for field in ("kv_cache_scheme", "transform_config"):
        if fields.get(field):
            raise CheckpointError(f"quantization_config: {field} is not served; quantize weights only")
    if fields.get("sparsity_config"):
        _only(_object(fields, "sparsity_config"), "format", ("dense", None))
    groups = _object(fields, "config_groups")
    blocks = [block for name in groups for block in _compressed_blocks(_object(groups, name))]

    def make(module: str, tensors: Tensors) -> NarrowTensor | None:
        if (packed := tensors.get(f"{module}.weight_packed")) is None:
            return _scaled(module, tensors, ("F8_E4M3", "I8"), blocks)
        if f"{module}.weight_g_idx" in tensors:
            raise CheckpointError(f"{module}.weight_g_idx (actorder) is not served, only consecutive groups")
        scale, shape = (_needed(tensors, module, end) for end in (".weight_scale", ".weight_shape"))
        return packed_words(f"{module}.weight", packed, scale, tensors.get(f"{module}.weight_zero_point"), shape)

    return (".weight_packed", ".weight"), make


def _compressed_blocks(group: Json) -> list[tuple[int, int]]:
    """Sizes of the blocks of weights in a group of modules that are quantized alike, none or one."""
    _only(group, "format", COMPRESSED)
    if group.get("weights") is None:
        return []
    weights = _object(group, "weights")
    _only(weights, "type", ("int", "float"))
    _only(weights, "num_bits", (8,) if weights.get("type") == "float" else (4, 8))
    _only(weights, "strategy", ("tensor", "channel", "group", "block", None))
    _only(weights, "dynamic", (False, None))
    return [_pair(weights.get("block_structure"))] if weights.get("strategy") == "block" else []


def _scaled(
    module: str, tensors: Tensors, dtypes: tuple[str, ...], blocks: list[tuple[int, int]]
) -> NarrowTensor | None:
    """A weight of 8-bit numbers; None: it is in another dtype."""
    weight = tensors.get(f"{module}.weight")
    scale = tensors.get(f"{module}.weight_scale_inv", tensors.get(f"{module}.weight_scale"))
    if weight is None or weight.dtype not in dtypes:
        return None
    if f"{module}.weight_zero_point" in tensors:
        raise CheckpointError(f"{module}.weight_zero_point is served for pack-quantized weights only")
    return float8(weight.name, weight, scale or _needed(tensors, module, ".weight_scale"), blocks)


def _awq(fields: Json) -> tuple[tuple[str, ...], Make]:
    _only(fields, "version", ("gemm", "GEMM", None))
    _only({"bits": fields.get("w_bit"), **fields}, "bits", (4, None))

    def make(module: str, tensors: Tensors) -> NarrowTensor:
        weight, scale = tensors[f"{module}.qweight"], _needed(tensors, module, ".scales")
        return awq(f"{module}.weight", weight, scale, tensors.get(f"{module}.qzeros"))

    return (".qweight",), make


def _gptq(fields: Json) -> tuple[tuple[str, ...], Make]:
    _only(fields, "bits", (4, 8))
    _only(fields, "checkpoint_format", ("gptq", "gptq_v2", None))
    more = 0 if fields.get("checkpoint_format") == "gptq_v2" else 1

    def make(module: str, tensors: Tensors) -> NarrowTensor:
        weight, scale = tensors[f"{module}.qweight"], _needed(tensors, module, ".scales")
        order = tensors.get(f"{module}.g_idx")
        if fields.get("desc_act"):
            order = _needed(tensors, module, ".g_idx")
        return gptq(f"{module}.weight", weight, scale, _needed(tensors, module, ".qzeros"), order, more)

    return (".qweight",), make


def _mxfp4(fields: Json) -> tuple[tuple[str, ...], Make]:
    return ("_blocks",), lambda module, tensors: mxfp4(
        module, tensors[f"{module}_blocks"], _needed(tensors, module, "_scales")
    )


READERS = {"fp8": _float8, "compressed-tensors": _compressed, "awq": _awq, "gptq": _gptq, "mxfp4": _mxfp4}
"""``quant_method`` -> ends of the names of main tensors, and what makes weights of them."""


def _needed(tensors: Tensors, module: str, end: str) -> StoredTensor:
    if (tensor := tensors.get(module + end)) is None:
        raise CheckpointError(f"the files lack {module}{end}, which the quantized weight of {module} needs")
    return tensor


def _only(fields: Json, field: str, served: tuple[Any, ...]) -> None:
    if (value := fields.get(field)) not in served:
        named = ", ".join(repr(one) for one in served if one is not None)
        raise CheckpointError(f"quantization_config: {field} = {value!r} is not served, only {named}")


def _object(fields: Json, field: str) -> Json:
    if not isinstance(value := fields.get(field), dict):
        raise CheckpointError(f"quantization_config: {field} is {value!r}; an object is needed")
    return value


def _pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or [type(n) for n in value] != [int, int] or min(value) < 1:
        raise CheckpointError(f"quantization_config: a block of weights is {value!r}; two sizes are needed")
    return value[0], value[1]
