"""What ``quantization_config`` of a ``config.json`` says, and which tensors of the files it makes one weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

FIELDS = ("quantization_config", "compression_config")
"""Names of the field that says so; the second is that of older files of compressed-tensors."""
Said = tuple[Any, int | None]
"""Bits of a weight, and inputs that share a scale (-1: all), as a configuration says them, or leaves them open."""

BESIDE = ("input_scale", "input_zero_point", "activation_scale", "weight_shape", "g_idx", "weight_g_idx")
"""Tensors beside those that make up a weight: scales of activations, which are not quantized here, and the like."""
SERVED = (
    "fp8 (blocks or tensors), compressed-tensors (float-quantized, int-quantized, pack-quantized of 4 and 8 bits), "
    "awq (gemm, 4 bits), gptq (4 and 8 bits) and mxfp4 are"
)


def quantization(config: Json) -> Json | None:
    """What a ``config.json`` says about fewer bits; None: nothing.

    Raises:
        CheckpointError: it is no object.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for field in FIELDS:
            if (fields := part.get(field)) is not None:
                if not isinstance(fields, dict):
                    raise CheckpointError(f"config.json: {field} is {fields!r}; an object is needed")
                return fields
    return None


def narrowed(config: Json, tensors: dict[str, StoredTensor]) -> Stored:
    """The tensors of a folder, those of each quantized weight as one.

    Which weights these are is seen from the tensors.

    Raises:
        CheckpointError: a variant that is not served, or tensors that do not make up a weight.
    """
    fields = quantization(config)
    if fields is None:
        return dict(tensors)
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
    of_groups = [weights for name in groups if (weights := _compressed_weights(_object(groups, name))) is not None]
    blocks = [_pair(weights.get("block_structure")) for weights in of_groups if weights.get("strategy") == "block"]
    said = [(weights["num_bits"], _group_size(weights.get("group_size"))) for weights in of_groups]

    def make(module: str, tensors: Tensors) -> NarrowTensor | None:
        if (packed := tensors.get(f"{module}.weight_packed")) is None:
            weight = _scaled(module, tensors, ("F8_E4M3", "I8"), blocks)
            return weight and _as_said(weight, [(bits, None) for bits, _ in said])
        if f"{module}.weight_g_idx" in tensors:
            raise CheckpointError(f"{module}.weight_g_idx (actorder) is not served, only consecutive groups")
        scale, shape = (_needed(tensors, module, end) for end in (".weight_scale", ".weight_shape"))
        zero = tensors.get(f"{module}.weight_zero_point")
        return _as_said(packed_words(f"{module}.weight", packed, scale, zero, shape), said)

    return (".weight_packed", ".weight"), make


def _compressed_weights(group: Json) -> Json | None:
    """How weights of a group of modules are quantized; None: they are not."""
    _only(group, "format", COMPRESSED)
    if group.get("weights") is None:
        return None
    weights = _object(group, "weights")
    _only(weights, "type", ("int", "float"))
    _only(weights, "num_bits", (8,) if weights.get("type") == "float" else (4, 8))
    _only(weights, "strategy", ("tensor", "channel", "group", "block", None))
    _only(weights, "dynamic", (False, None))
    return weights


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
    said = [(4, _group_size(fields.get("group_size", fields.get("q_group_size"))))]

    def make(module: str, tensors: Tensors) -> NarrowTensor:
        weight, scale = tensors[f"{module}.qweight"], _needed(tensors, module, ".scales")
        return _as_said(awq(f"{module}.weight", weight, scale, tensors.get(f"{module}.qzeros")), said)

    return (".qweight",), make


def _gptq(fields: Json) -> tuple[tuple[str, ...], Make]:
    _only(fields, "bits", (4, 8))
    _only(fields, "checkpoint_format", ("gptq", "gptq_v2", None))
    lessened, symmetric = fields.get("checkpoint_format") != "gptq_v2", fields.get("sym") is True
    said = _gptq_said(fields)

    def make(module: str, tensors: Tensors) -> NarrowTensor:
        weight, scale = tensors[f"{module}.qweight"], _needed(tensors, module, ".scales")
        order = tensors.get(f"{module}.g_idx")
        if fields.get("desc_act"):
            order = _needed(tensors, module, ".g_idx")
        zero = _needed(tensors, module, ".qzeros")
        made = gptq(f"{module}.weight", weight, scale, zero, order, lessened=lessened, symmetric=symmetric)
        return _as_said(made, said)

    return (".qweight",), make


def _gptq_said(fields: Json) -> list[Said]:
    """What holds for most weights, then what ``dynamic`` says for some."""
    some = fields.get("dynamic") or {}
    others = [one for one in some.values() if isinstance(one, dict)] if isinstance(some, dict) else []
    return [
        (one.get("bits"), _group_size(one.get("group_size"))) for one in (fields, *({**fields, **o} for o in others))
    ]


def _mxfp4(fields: Json) -> tuple[tuple[str, ...], Make]:
    return ("_blocks",), lambda module, tensors: mxfp4(
        module, tensors[f"{module}_blocks"], _needed(tensors, module, "_scales")
    )


READERS = {"fp8": _float8, "compressed-tensors": _compressed, "awq": _awq, "gptq": _gptq, "mxfp4": _mxfp4}
"""``quant_method`` -> ends of the names of main tensors, and what makes weights of them."""


def _as_said(weight: NarrowTensor, said: Sequence[Said]) -> NarrowTensor:
    """The same, if its tensors have the bits and groups that the configuration says of some weights.

    Raises:
        CheckpointError: they contradict it.
    """
    form, inputs = weight.form, weight.shape[-1]
    found = 8 // form.per_item, form.inputs or inputs
    sizes = [(bits, inputs if size == -1 else size and min(size, inputs)) for bits, size in said]
    if said and not any(bits in (None, found[0]) and size in (None, found[1]) for bits, size in sizes):
        wanted = " or ".join(f"bits = {bits}, group_size = {size}" for bits, size in said)
        raise CheckpointError(
            f"quantization_config says {wanted}, but the tensors of {weight.name} hold {found[0]} bits in groups of "
            f"{found[1]} of {inputs} inputs; take config.json and weights from the same checkpoint"
        )
    return weight


def _group_size(value: Any) -> int | None:
    if value is not None and (type(value) is not int or (value < 1 and value != -1)):
        raise CheckpointError(f"quantization_config: group_size is {value!r}; a size is needed, or -1 for all inputs")
    return value


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
