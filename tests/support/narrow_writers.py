"""Checkpoints in fewer bits, written from the specifications of their tools, beside the same weights made wide again.

Words are put together number by number, so that nothing here is the inverse of the code that reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


class Written(NamedTuple):
    """One weight ``[O, I]``."""

    tensors: Tensors
    """By the end of their names, after the module's."""
    weight: np.ndarray
    """What they stand for, float32."""


Writer = Callable[[np.ndarray], Written]


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """``[n, m]`` as int32 words ``[n, ceil(m * bits / 32)]``, lowest bits first."""
    each = 32 // bits
    out = np.zeros((len(numbers), -(-numbers.shape[1] // each)), np.int64)
    for column in range(numbers.shape[1]):
        out[:, column // each] |= numbers[:, column].astype(np.int64) << bits * (column % each)
    return out.astype(np.uint32).view(np.int32)


def grouped(weight: np.ndarray, group: int, bits: int, *, zeros: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes ``[O, I]`` from 0, scales ``[O, I / group]`` float16 and zeros of the same shape."""
    parts = weight.reshape(len(weight), -1, group)
    largest = 2**bits - 1
    if zeros:
        low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
        scale = np.maximum((high - low) / largest, 1e-4).astype(np.float16).astype(np.float32)
        zero = np.clip(np.round(-low / scale), 1, largest)
    else:
        scale = np.maximum(np.abs(parts).max(-1) / (2 ** (bits - 1) - 1), 1e-4).astype(np.float16).astype(np.float32)
        zero = np.full(scale.shape, 2 ** (bits - 1))
    codes = np.clip(np.round(parts / scale[..., None]) + zero[..., None], 0, largest)
    return codes.reshape(weight.shape).astype(np.int64), scale, zero.astype(np.int64)


def dequantised(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """``(code - zero) * scale``, of groups of inputs."""
    parts = codes.reshape(*scale.shape, -1) - zero[..., None]
    return (parts * scale[..., None]).reshape(codes.shape).astype(np.float32)


def packed_quantized(bits: int, group: int | None, *, zeros: bool) -> Writer:
    def write(weight: np.ndarray) -> Written:
        codes, scale, zero = grouped(weight, group or weight.shape[1], bits, zeros=zeros)
        tensors: Tensors = {
            ".weight_packed": words(codes, bits),
            ".weight_scale": scale.astype(np.float16),
            ".weight_shape": np.array(weight.shape, np.int64),
        }
        if zeros:
            tensors[".weight_zero_point"] = words(zero.T, bits).T.copy()
        return Written(tensors, dequantised(codes, scale, zero))

    return write


def awq(group: int) -> Writer:
    def write(weight: np.ndarray) -> Written:
        codes, scale, zero = grouped(weight, group, 4, zeros=True)

        def gemm(columns: np.ndarray) -> np.ndarray:
            """``[n, O]`` with nibble p of word j holding column 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[p]."""
            turned = columns.reshape(len(columns), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
            return words(turned.reshape(columns.shape), 4)

        tensors = {".qweight": gemm(codes.T), ".qzeros": gemm(zero.T), ".scales": scale.T.astype(np.float16)}
        return Written(tensors, dequantised(codes, scale, zero))

    return write


def gptq(bits: int, group: int | None, *, zeros: bool, version: int) -> Writer:
    def write(weight: np.ndarray) -> Written:
        size = group or weight.shape[1]
        codes, scale, zero = grouped(weight, size, bits, zeros=zeros)
        tensors = {
            ".qweight": words(codes, bits).T.copy(),
            ".qzeros": words(zero.T - (version == 1), bits),
            ".scales": scale.T.astype(np.float16),
            ".g_idx": (np.arange(weight.shape[1]) // size).astype(np.int32),
            ".bias": np.zeros(len(weight), np.float16),  # written whether the model has one or not
        }
        return Written(tensors, dequantised(codes, scale, zero))

    return write


def float8(strategy: str, block: tuple[int, int] = (128, 128), *, dtype: Any = np.float32, name: str) -> Writer:
    """``strategy``: tensor, channel or block."""

    def write(weight: np.ndarray) -> Written:
        outputs, inputs = weight.shape
        size = {"tensor": weight.shape, "channel": (1, inputs), "block": block}[strategy]
        grid = -(-outputs // size[0]), -(-inputs // size[1])
        scale = np.zeros(grid, dtype)
        codes, wide = np.zeros(weight.shape, jnp.float8_e4m3fn), np.zeros(weight.shape, np.float32)
        for i in range(grid[0]):
            for j in range(grid[1]):
                here = np.s_[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
                scale[i, j] = np.abs(weight[here]).max() / 448
                number = np.float32(scale[i, j])
                codes[here] = np.clip(weight[here] / number, -448, 448).astype(jnp.float8_e4m3fn)  # scales are rounded
                wide[here] = codes[here].astype(np.float32) * number
        stored = scale.reshape(()) if strategy == "tensor" and name == ".weight_scale" else scale
        return Written({".weight": codes, name: stored}, wide)

    return write


def int8_channels(weight: np.ndarray) -> Written:
    scale = np.abs(weight).max(1, keepdims=True) / 127
    codes = np.round(weight / scale).astype(np.int8)
    return Written({".weight": codes, ".weight_scale": scale.astype(np.float32)}, codes * scale.astype(np.float32))


def mxfp4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks ``[…, O, I / 32, 16]``, exponents ``[…, O, I / 32]``, and what they stand for."""
    parts = weight.reshape(*weight.shape[:-1], -1, 32)
    exponent = np.ceil(np.log2(np.abs(parts).max(-1) / 6))
    codes = np.abs(parts[..., None] / 2.0 ** exponent[..., None, None] - E2M1).argmin(-1).astype(np.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    wide = (E2M1[codes] * 2.0 ** exponent[..., None]).reshape(weight.shape).astype(np.float32)
    return blocks, (exponent + 127).astype(np.uint8), wide


def _group(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    activations = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True} if bits == 8 else None
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}


def _compressed(format_: str, groups: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": groups,
        "ignore": ["lm_head", "re:.*layers\\.0\\.self_attn\\.o_proj"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "group_size": 32}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
WRITERS: dict[str, tuple[dict[str, Any], Writer]] = {
    "fp8-block": (
        FP8 | {"weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
        float8("block", name=".weight_scale_inv"),
    ),
    "fp8-block-small": (FP8 | {"weight_block_size": [32, 16]}, float8("block", (32, 16), name=".weight_scale_inv")),
    "fp8-block-ue8m0": (
        FP8 | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        float8("block", dtype=jnp.float8_e8m0fnu, name=".weight_scale_inv"),
    ),
    "fp8-tensor": (
        FP8 | {"activation_scheme": "static"},
        lambda weight: Written(
            {**(found := float8("tensor", name=".weight_scale")(weight)).tensors, ".input_scale": np.float32(2.0)},
            found.weight,
        ),
    ),
    "float-quantized-tensor": (
        _compressed("float-quantized", _group("float", 8, "tensor")),
        float8("tensor", name=".weight_scale", dtype=jnp.bfloat16),
    ),
    "float-quantized-channel": (
        _compressed("float-quantized", _group("float", 8, "channel")),
        float8("channel", name=".weight_scale", dtype=jnp.bfloat16),
    ),
    "float-quantized-block": (
        _compressed("float-quantized", _group("float", 8, "block", block_structure=[16, 32])),
        float8("block", (16, 32), name=".weight_scale"),
    ),
    "int-quantized": (_compressed("int-quantized", _group("int", 8, "channel")), int8_channels),
    "pack-quantized-4": (
        _compressed("pack-quantized", _group("int", 4, "group", group_size=32)),
        packed_quantized(4, 32, zeros=False),
    ),
    "pack-quantized-4-channel": (
        _compressed("pack-quantized", _group("int", 4, "channel")),
        packed_quantized(4, None, zeros=False),
    ),
    "pack-quantized-4-zeros": (
        _compressed("pack-quantized", _group("int", 4, "group", group_size=16, symmetric=False)),
        packed_quantized(4, 16, zeros=True),
    ),
    "pack-quantized-8": (
        _compressed("pack-quantized", _group("int", 8, "channel")),
        packed_quantized(8, None, zeros=False),
    ),
    "pack-quantized-8-zeros": (
        _compressed("pack-quantized", _group("int", 8, "group", group_size=32, symmetric=False)),
        packed_quantized(8, 32, zeros=True),
    ),
    "awq": (AWQ, awq(32)),
    "gptq": (GPTQ, gptq(4, 32, zeros=True, version=1)),
    "gptq-symmetric": (GPTQ | {"sym": True, "group_size": -1}, gptq(4, None, zeros=False, version=1)),
    "gptq-symmetric-groups": (GPTQ | {"sym": True}, gptq(4, 32, zeros=False, version=1)),
    "gptq-v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(4, 32, zeros=True, version=2)),
    "gptq-8": (GPTQ | {"bits": 8}, gptq(8, 32, zeros=False, version=1)),
}
"""Name -> ``quantization_config`` and what writes a weight."""


def write_narrow(wide: Path, narrow: Path, again: Path, name: str, skip: tuple[str, ...] = ()) -> None:
    """Write the folder ``wide`` in fewer bits, and as the wide weights that these stand for.

    Args:
        wide: a Hugging Face folder.
        narrow: gets it in fewer bits.
        again: gets the same weights in float32.
        name: of :data:`WRITERS`.
        skip: ends of the names of modules that stay as they are.
    """
    config, writer = WRITERS[name]
    ignored = ("layers.0.self_attn.o_proj",) if config["quant_method"] == "compressed-tensors" else ()
    fewer, same = {}, {}
    for tensor, array in load_file(wide / "model.safetensors").items():
        full = array.astype(np.float32)
        module = tensor.removesuffix(".weight")
        if not module.endswith("_proj") or module.endswith((*ignored, *skip)):
            fewer[tensor] = same[tensor] = full
            continue
        written = writer(full)
        fewer.update({module + end: np.asarray(part) for end, part in written.tensors.items()})
        same[tensor] = written.weight
    fields = json.loads((wide / "config.json").read_text())
    for folder, tensors, more in ((narrow, fewer, {"quantization_config": config}), (again, same, {})):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps({**fields, "dtype": "float32", **more}))
