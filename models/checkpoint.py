"""Weights in and out: Hugging Face safetensors and Orbax.

A Hugging Face folder is read tensor by tensor, each put on the device (and there quantised, if that is wanted) and
dropped, so that neither the host nor the device holds much more than one copy of the model.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .config import CheckpointError, ModelConfig, read_json
from .decoder import Decoder
from .quantize import SCALE, quantize
from .sharding import abstract_decoder, default_mesh

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

ORBAX = "orbax"
"""Subfolder of the arrays of an Orbax checkpoint; config and tokenizer lie beside it as in a Hugging Face folder."""
INDEX = "model.safetensors.index.json"
BESIDE = (
    *("config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json"),
)
"""Files that go along with the weights."""

TOP = {"embed.weight": "model.embed_tokens", "norm.scale": "model.norm", "lm_head.weight": "lm_head"}
LAYER = {
    "input_norm.scale": ("input_layernorm",),
    "post_attention_norm.scale": ("post_attention_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.o": ("self_attn.o_proj",),
    "attention.q_norm.scale": ("self_attn.q_norm",),
    "attention.k_norm.scale": ("self_attn.k_norm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
"""Our parameter -> Hugging Face modules, which ours joins block by block; the tensors are their ``weight``, or their
``bias`` where ours ends in ``_bias``."""


class Tensor(NamedTuple):
    """A Hugging Face tensor that is a parameter of ours, or a part of one."""

    name: str
    shape: tuple[int, ...]
    """There: ``[out, in]`` for projections."""
    transposed: bool
    part: tuple[int, ...]
    """Its shape here; where parts are joined, their outputs are ``[blocks, w, size]``, and lie side by side in w."""


def hf_tensors(path: tuple[Any, ...], shape: tuple[int, ...], config: ModelConfig) -> list[Tensor]:
    """Where the parameter at ``path``, such as ``("layers", 0, "attention", "qkv")``, comes from, in order."""
    parts = [str(part) for part in path]
    bias = parts[-1].endswith("_bias")
    parts[-1] = parts[-1].removesuffix("_bias")
    if parts[0] == "layers":
        modules = [f"model.layers.{parts[1]}.{module}" for module in LAYER[".".join(parts[2:])]]
    else:
        modules = [TOP[".".join(parts)]]
    block = config.head_dim if parts[-1] == "qkv" else config.ffn_block
    joined = config.num_heads // config.num_kv_heads + 2 if parts[-1] == "qkv" else 2
    found = []
    for i, module in enumerate(modules):
        part = shape
        if len(modules) > 1:  # all but the first are one wide
            width = 1 if i else joined - len(modules) + 1
            part = (*shape[:-1], shape[-1] // (joined * block), width, block)
        flat = bias or len(shape) == 1
        transposed = not flat and parts[0] != "embed"
        there = (math.prod(part),) if flat else (math.prod(part[1:]), part[0]) if transposed else part
        found.append(Tensor(f"{module}.{'bias' if bias else 'weight'}", there, transposed, part))
    return found


def load(
    folder: Path, dtype: Any, mesh: Mesh | None = None, *, narrow: Any = None, progress: Progress | None = None
) -> Decoder:
    """The decoder in a Hugging Face or Orbax folder.

    Args:
        folder: of the checkpoint.
        dtype: what weights are cast to.
        mesh: the devices that get it; None: the first one.
        narrow: eight-bit dtype to which the layers' matrices are quantised. None: they are not, unless the folder holds
            quantised ones, which stay as they are.
        progress: told of Hugging Face folders.

    Raises:
        CheckpointError: the folder cannot be served; the message names the file or tensor.
    """
    if (folder / ORBAX).is_dir():
        return load_orbax(folder, dtype, mesh, narrow=narrow)
    return load_hf(folder, dtype, mesh, narrow=narrow, progress=progress)


def load_hf(
    folder: Path, dtype: Any, mesh: Mesh | None = None, *, narrow: Any = None, progress: Progress | None = None
) -> Decoder:
    """Read ``config.json`` and the safetensors of a Hugging Face folder.

    The host reads every tensor once, and every device gets its own part of it.

    Raises:
        CheckpointError: as :func:`load`.
    """
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    graph, state = nnx.split(abstract_decoder(config, dtype, mesh or default_mesh(), narrow=narrow))
    params = dict(nnx.to_flat_state(state))
    parts = {path: hf_tensors(path, leaf.shape, config) for path, leaf in params.items() if not _is_scale(path)}
    total = sum(math.prod(params[path].shape) for path in parts) * np.dtype(dtype).itemsize
    done = 0
    with ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check_names(folder, {part.name for of_one in parts.values() for part in of_one}, set(tensors), config)
        for path, of_one in parts.items():
            arrays = [_read(tensors[part.name], part) for part in of_one]
            whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-2)
            _fill(params, path, whole.reshape(params[path].shape), dtype)
            done += whole.size * np.dtype(dtype).itemsize
            if progress is not None:
                progress(done, total)
    return nnx.merge(graph, nnx.from_flat_state(params))


def _fill(params: dict[tuple[Any, ...], Any], path: tuple[Any, ...], whole: np.ndarray, dtype: Any) -> None:
    """Put a weight into the abstract ``params``: in ``dtype``, or quantised if it has scales there."""
    if _scale_of(path) in params:
        whole = whole.astype(jax.dtypes.canonicalize_dtype(whole.dtype), copy=False)
        _fill_quantized(params, path, _put(whole, params[path].sharding))
    else:
        params[path] = params[path].replace(_put(whole.astype(dtype, copy=False), params[path].sharding))


def _fill_quantized(params: dict[tuple[Any, ...], Any], path: tuple[Any, ...], wide: jax.Array) -> None:
    leaf, scale = params[path], params[_scale_of(path)]
    make = _quantizer(leaf.dtype, (leaf.sharding, scale.sharding))
    values, scales = jax.block_until_ready(make(wide))  # or many wide ones could wait on the device for their turn
    params[path], params[_scale_of(path)] = leaf.replace(values), scale.replace(scales)


@functools.cache
def _quantizer(dtype: Any, shardings: tuple[jax.sharding.Sharding, jax.sharding.Sharding]) -> Any:
    return jax.jit(lambda weight: quantize(weight, dtype), out_shardings=shardings)


def _scale_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*path[:-1], f"{path[-1]}{SCALE}")


def _is_scale(path: tuple[Any, ...]) -> bool:
    return str(path[-1]).endswith(SCALE)


def save_hf(decoder: Decoder, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (weights as they are) as a Hugging Face folder.

    Raises:
        CheckpointError: the decoder is quantised.
    """
    params = nnx.to_flat_state(nnx.state(decoder))
    if any(_is_scale(path) for path, _ in params):
        raise CheckpointError("quantised weights have no Hugging Face form here; write them with Orbax")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, leaf in params:
        array = np.asarray(leaf[...])
        parts = hf_tensors(path, array.shape, decoder.config)
        pieces = [array]
        if len(parts) > 1:
            ends = np.cumsum([part.part[-2] for part in parts])
            first = parts[0].part
            pieces = np.split(array.reshape(*first[:-2], ends[-1], first[-1]), ends[:-1], axis=-2)
        for part, piece in zip(parts, pieces, strict=True):
            tensors[part.name] = np.ascontiguousarray(
                piece.reshape(part.shape[::-1]).T if part.transposed else piece.reshape(part.shape)
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = np.dtype(next(iter(tensors.values())).dtype).name
    (folder / "config.json").write_text(json.dumps({**decoder.config.to_hf(), "dtype": dtype}, indent=2) + "\n")


def save_orbax(decoder: Decoder, folder: Path) -> None:
    """Write the weights with Orbax, beside a ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / ORBAX).absolute(), nnx.to_pure_dict(nnx.state(decoder)), force=True)
    (folder / "config.json").write_text(json.dumps(decoder.config.to_hf(), indent=2) + "\n")


def load_orbax(folder: Path, dtype: Any, mesh: Mesh | None = None, *, narrow: Any = None) -> Decoder:
    """Read what :func:`save_orbax` wrote, every device its own part. To quantise it takes a wide copy of the model;
    quantised ones need none.

    Raises:
        CheckpointError: the arrays are damaged, do not fit ``config.json``, or are quantised to another dtype.
    """
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    mesh = mesh or default_mesh()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata((folder / ORBAX).absolute()).item_metadata.tree
            found = {".".join(str(key.key) for key in path): leaf for path, leaf in _leaves(stored)}
            kept = {leaf.dtype for name, leaf in found.items() if name + SCALE in found}
            if narrow is not None and kept - {narrow}:
                raise CheckpointError(f"{folder} is quantised to {', '.join(map(str, kept))}, not to {narrow}")
            graph, state = nnx.split(abstract_decoder(config, dtype, mesh, narrow=next(iter(kept), None)))
            wanted = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
            # Asked before the restore, which leaves its reads unawaited when one fails.
            shapes = {name: leaf.shape for name, leaf in found.items()}
            if differ := sorted(n for n in wanted.keys() | shapes if wanted.get(n) != shapes.get(n)):
                raise CheckpointError(f"{folder / ORBAX} does not fit its config.json: {', '.join(differ[:5])}")
            arrays = checkpointer.restore((folder / ORBAX).absolute(), nnx.to_pure_dict(state))
    except (ValueError, KeyError, AttributeError, FileNotFoundError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / ORBAX} is damaged: {error}") from error
    nnx.replace_by_pure_dict(state, arrays)
    if narrow is None or kept:
        return nnx.merge(graph, state)
    wide = dict(nnx.to_flat_state(state))
    del arrays, state
    graph, state = nnx.split(abstract_decoder(config, dtype, mesh, narrow=narrow))
    params = dict(nnx.to_flat_state(state))
    for path in list(wide):
        leaf = wide.pop(path)
        if _scale_of(path) in params:
            _fill_quantized(params, path, leaf[...])
        else:
            params[path] = leaf
    return nnx.merge(graph, nnx.from_flat_state(params))


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))[0]


def copy_beside(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and chat template from one checkpoint folder to another."""
    for name in BESIDE:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copy(source / name, target / name)


def random_decoder(
    config: ModelConfig, dtype: Any, seed: int, mesh: Mesh | None = None, *, narrow: Any = None
) -> Decoder:
    """Random weights, made where they belong; nothing passes through the host."""
    graph, state = nnx.split(abstract_decoder(config, dtype, mesh or default_mesh(), narrow=narrow))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    make = jax.jit(
        lambda: nnx.state(Decoder(config, dtype=dtype, narrow=narrow, rngs=nnx.Rngs(seed))), out_shardings=shardings
    )
    return nnx.merge(graph, make())


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Give every device of this process its part of an array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _open_tensors(folder: Path, stack: ExitStack) -> Mapping[str, Any]:
    """Name -> open safetensors file that holds it."""
    found = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or incomplete ({error}); fetch it again") from error
        found.update(dict.fromkeys(file.keys(), file))
    return found


def _weight_files(folder: Path) -> Iterator[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        yield single
        return
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has neither model.safetensors nor {INDEX}; only safetensors are read")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or any(
        not isinstance(name, str) or Path(name).name != name for name in names.values()
    ):
        raise CheckpointError(f"{folder / INDEX} must map tensors to files in its own folder")
    for name in sorted(set(names.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which {INDEX} names; fetch it again")
        yield folder / name


def _check_names(folder: Path, wanted: set[str], found: set[str], config: ModelConfig) -> None:
    if missing := sorted(wanted - found):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}{' …' * (len(missing) > 5)}"
        )
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    extra = sorted(name for name in found - wanted - tied if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise CheckpointError(
            f"{folder} holds {len(extra)} tensors that config.json does not account for: {', '.join(extra[:5])}"
        )


def _read(file: Any, part: Tensor) -> np.ndarray:
    try:
        array = file.get_tensor(part.name)
    except SafetensorError as error:
        raise CheckpointError(f"tensor {part.name} cannot be read: {error}") from error
    if array.shape != part.shape:
        raise CheckpointError(f"tensor {part.name} has shape {array.shape}; config.json makes it {part.shape}")
    result: np.ndarray = (array.T if part.transposed else array).reshape(part.part)
    return result
