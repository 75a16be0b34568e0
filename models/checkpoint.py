"""Weights in and out: Hugging Face safetensors and Orbax.

A Hugging Face folder is read tensor by tensor: each is put on the device (and quantized there on request) and dropped,
so neither CPU memory nor the device holds much more than one copy of the model.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from .config import CheckpointError, LayerKind, ModelConfig
from .config_file import read_json
from .decoder import Decoder, Layer
from .families import ignored_layers, read_config, to_hf
from .formats import FORMATS, Format
from .formats import quantize as quantized
from .hf_layout import HEAD, HfTensor, check_tensors, hf_tensors, read_joined, settle_head
from .hf_views import canonical
from .matrix import everywhere
from .safetensors_files import StoredTensor, open_tensors
from .sharding import abstract_decoder, default_mesh

SCALES = "scales"
"""Last part of the path of a matrix's scales, which lie beside its weight."""
FORMS = {form.dtype: form for form in FORMATS.values()}
"""Dtype of the codes of Orbax checkpoints -> form."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

ORBAX = "orbax"
"""Subfolder of the arrays of an Orbax checkpoint; config and tokenizer lie beside it as in a Hugging Face folder."""
BESIDE = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "additional_chat_templates",
)
"""Files and folders that go along with the weights."""


def load(
    folder: Path,
    dtype: Any,
    mesh: Mesh | None = None,
    *,
    quantize: Format | None = None,
    max_context: int | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Load the decoder in a Hugging Face or Orbax folder.

    Args:
        folder: of the checkpoint.
        dtype: what weights are cast to.
        mesh: the devices that get it; None: the first one.
        quantize: form to which the layers' matrices are quantized. None: they stay as they are in the folder, which
            may be quantized.
        max_context: tokens of the longest context that will be served (:func:`.families.read_config`).
        progress: is called while a Hugging Face folder is read.

    Raises:
        CheckpointError: the folder cannot be served; the message names the file or tensor.
    """
    if (folder / ORBAX).is_dir():
        return load_orbax(folder, dtype, mesh, quantize=quantize, max_context=max_context)
    return load_hf(folder, dtype, mesh, quantize=quantize, max_context=max_context, progress=progress)


def load_hf(
    folder: Path,
    dtype: Any,
    mesh: Mesh | None = None,
    *,
    quantize: Format | None = None,
    max_context: int | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """Read ``config.json`` and the safetensors of a Hugging Face folder.

    Every tensor is read once, and every device gets its own part of it.

    Raises:
        CheckpointError: as :func:`load`.
    """
    fields = read_json(folder / "config.json")
    config = read_config(fields, max_context)
    tensors = canonical(open_tensors(folder), config, ignored_layers(fields))
    config = settle_head(folder, config, tensors, dtype)
    graph, state = nnx.split(abstract_decoder(config, dtype, mesh or default_mesh(), forms=everywhere(quantize)))
    params = dict(nnx.to_flat_state(state))
    parts = {path: hf_tensors(path, leaf.shape, config) for path, leaf in params.items() if not _is_scale(path)}
    check_tensors(folder, [part for of_one in parts.values() for expert in of_one for part in expert], tensors)
    total = sum(math.prod(params[path].shape) for path in parts) * np.dtype(dtype).itemsize
    done = 0
    for path, of_one in parts.items():
        whole = _read(tensors, of_one, params[path].shape, dtype)
        _fill(params, path, whole)
        done += whole.size * np.dtype(dtype).itemsize
        if progress is not None:
            progress(done, total)
    return nnx.merge(graph, nnx.from_flat_state(params))


def _read(
    tensors: dict[str, StoredTensor], experts: list[list[HfTensor]], shape: tuple[int, ...], dtype: Any
) -> np.ndarray:
    """A parameter, in the dtypes of its tensors; that of all experts in ``dtype``, expert by expert into its place."""
    if len(experts) == 1:
        return read_joined([tensors[part.name] for part in experts[0]], experts[0]).reshape(shape)
    whole = np.empty(shape, dtype)
    for e, parts in enumerate(experts):
        whole[e] = read_joined([tensors[part.name] for part in parts], parts).reshape(shape[1:])
    return whole


def _fill(params: dict[tuple[Any, ...], Any], path: tuple[Any, ...], whole: np.ndarray) -> None:
    """Put a weight into the abstract ``params``: in the dtype that it has there, or quantized if it has scales."""
    if _scale_of(path) in params:
        whole = whole.astype(jax.dtypes.canonicalize_dtype(whole.dtype), copy=False)
        _fill_quantized(params, path, _put(whole, params[path].sharding))
    else:
        leaf = params[path]
        params[path] = leaf.replace(_put(whole.astype(leaf.dtype, copy=False), leaf.sharding))


def _fill_quantized(params: dict[tuple[Any, ...], Any], path: tuple[Any, ...], weight: jax.Array) -> None:
    leaf, scale = params[path], params[_scale_of(path)]
    make = _quantizer(FORMS[leaf.dtype], (leaf.sharding, scale.sharding))
    values, scales = jax.block_until_ready(make(weight))  # else many full weights could wait on the device
    params[path], params[_scale_of(path)] = leaf.replace(values), scale.replace(scales)


@functools.cache
def _quantizer(form: Format, shardings: tuple[jax.sharding.Sharding, jax.sharding.Sharding]) -> Any:
    return jax.jit(lambda weight: quantized(weight, form), out_shardings=shardings)


def _scale_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*path[:-1], SCALES)


def _is_scale(path: tuple[Any, ...]) -> bool:
    return path[-1] == SCALES


def save_hf(decoder: Decoder, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (weights as they are) as a Hugging Face folder.

    Raises:
        CheckpointError: the decoder is quantized, or of a family that has no such form here.
    """
    params = nnx.to_flat_state(nnx.state(decoder))
    if any(_is_scale(path) for path, _ in params):
        raise CheckpointError("quantized weights have no Hugging Face form here; write them with Orbax")
    fields = to_hf(decoder.config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, leaf in params:
        array = np.asarray(leaf[...])
        [parts] = hf_tensors(path, array.shape, decoder.config)
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
    (folder / "config.json").write_text(json.dumps({**fields, "dtype": dtype}, indent=2) + "\n")


def save_orbax(decoder: Decoder, folder: Path, config: Path | None = None) -> None:
    """Write the weights with Orbax, beside a ``config.json``: a copy of ``config``, or what follows from the decoder.

    Raises:
        CheckpointError: nothing follows, for a family that has no Hugging Face form here.
    """
    text = json.dumps(to_hf(decoder.config), indent=2) + "\n" if config is None else config.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / ORBAX).absolute(), nnx.to_pure_dict(nnx.state(decoder)), force=True)
    (folder / "config.json").write_text(text)


def load_orbax(
    folder: Path,
    dtype: Any,
    mesh: Mesh | None = None,
    *,
    quantize: Format | None = None,
    max_context: int | None = None,
) -> Decoder:
    """Read what :func:`save_orbax` wrote; every device reads its own part.

    To quantize needs memory for the model in ``dtype``; a model that was saved quantized does not.

    Raises:
        CheckpointError: the arrays are damaged, do not fit ``config.json``, or are quantized to another dtype.
    """
    config = read_config(read_json(folder / "config.json"), max_context)
    mesh = mesh or default_mesh()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata((folder / ORBAX).absolute()).item_metadata.tree
            found = {".".join(str(key.key) for key in path): leaf for path, leaf in _leaves(stored)}
            if HEAD in found:  # may be one that differs from the embedding, in spite of config.json
                config = replace(config, tie_embeddings=False)
            kept = {
                FORMS[leaf.dtype] for name, leaf in found.items() if f"{name.removesuffix('weight')}{SCALES}" in found
            }
            if quantize is not None and kept - {quantize}:
                names = ", ".join(form.codes for form in kept)
                raise CheckpointError(f"{folder} is quantized to {names}, not to {quantize.codes}")
            graph, state = nnx.split(abstract_decoder(config, dtype, mesh, forms=everywhere(next(iter(kept), None))))
            wanted = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
            # Checked before the restore, which leaves its reads unawaited when one fails.
            shapes = {name: leaf.shape for name, leaf in found.items()}
            if differ := sorted(n for n in wanted.keys() | shapes if wanted.get(n) != shapes.get(n)):
                raise CheckpointError(f"{folder / ORBAX} does not fit its config.json: {', '.join(differ[:5])}")
            arrays = checkpointer.restore((folder / ORBAX).absolute(), nnx.to_pure_dict(state))
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder / ORBAX} is damaged: {error}") from error
    nnx.replace_by_pure_dict(state, arrays)
    if quantize is None or kept:
        return nnx.merge(graph, state)
    full = dict(nnx.to_flat_state(state))
    del arrays, state
    graph, state = nnx.split(abstract_decoder(config, dtype, mesh, forms=everywhere(quantize)))
    params = dict(nnx.to_flat_state(state))
    for path in list(full):
        leaf = full.pop(path)
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
        if (source / name).exists() and not (target / name).exists():
            copy = shutil.copytree if (source / name).is_dir() else shutil.copy
            copy(source / name, target / name)


def random_decoder(
    config: ModelConfig, dtype: Any, seed: int, mesh: Mesh | None = None, *, quantize: Format | None = None
) -> Decoder:
    """A decoder with random weights, which are made on the devices that hold them.

    One executable makes every layer of a kind: that of all at once took XLA 95 s for Llama-3.1-8B on a GPU.
    """
    graph, state = nnx.split(abstract_decoder(config, dtype, mesh or default_mesh(), forms=everywhere(quantize)))
    layers = state.pop("layers")

    def make(shapes: Any, module: Callable[[nnx.Rngs], nnx.Module]) -> Callable[[jax.Array], Any]:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        return jax.jit(lambda key: nnx.state(module(nnx.Rngs(key))), out_shardings=shardings)

    def layer(kind: LayerKind) -> Callable[[nnx.Rngs], Layer]:
        return lambda rngs: Layer(config, kind, dtype, everywhere(quantize), rngs)

    made = make(state, lambda rngs: Decoder(replace(config, num_layers=0), dtype=dtype, rngs=rngs))
    kinds = config.layer_kinds
    makers = {kind: make(layers[kinds.index(kind)], layer(kind)) for kind in set(kinds)}
    keys = jax.random.split(jax.random.key(seed), len(kinds) + 1)
    filled = made(keys[0])
    filled["layers"] = nnx.State({i: makers[kind](key) for i, (kind, key) in enumerate(zip(kinds, keys[1:]))})
    return nnx.merge(graph, filled)


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Give every device of this process its part of an array."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
