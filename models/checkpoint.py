"""Weights in and out: Hugging Face safetensors and Orbax.

A Hugging Face folder is read tensor by tensor: each is put on the device (and quantized there on request) and dropped,
so neither CPU memory nor the device holds much more than one copy of the model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from .config import CheckpointError, LayerKind, ModelConfig
from .config_file import read_json
from .decoder import Decoder, Layer
from .families import ignored_layers, read_config, to_hf
from .formats import Format
from .hf_layout import check_tensors, hf_tensors, read_joined, settle_head
from .hf_views import Tensors, canonical
from .matrix import everywhere
from .narrow_layout import Experts, read_narrow, stored_form
from .orbax_files import ORBAX as ORBAX
from .orbax_files import load_orbax
from .orbax_files import save_orbax as save_orbax
from .parameters import (
    SCALES,
    ZEROS,
    Parameters,
    Place,
    beside,
    fill,
    fill_quantized,
    is_weight,
    matrix_forms,
    put,
)
from .quantization_config import narrowed
from .safetensors_files import open_tensors
from .sharding import abstract_decoder, default_mesh

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

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
    tensors = canonical(narrowed(fields, open_tensors(folder)), config, ignored_layers(fields))
    config = settle_head(folder, config, tensors, dtype)
    mesh = mesh or default_mesh()
    decoder = abstract_decoder(config, dtype, mesh)
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(decoder))}
    parts = {path: hf_tensors(path, shape, config) for path, shape in shapes.items()}
    check_tensors(folder, [part for of_one in parts.values() for expert in of_one for part in expert], tensors)
    kept = _kept(parts, tensors)
    if kept and quantize is not None:
        raise CheckpointError(f"{folder} is quantized already, to {next(iter(kept.values())).codes}; load it as it is")
    if kept or quantize is not None:
        decoder = abstract_decoder(config, dtype, mesh, forms=everywhere(quantize) if quantize else kept.get)
    forms, (graph, state) = matrix_forms(decoder), nnx.split(decoder)
    params: Parameters = dict(nnx.to_flat_state(state))
    done, total = 0, sum(_size(params[path]) for path in parts)
    for path, of_one in parts.items():
        form = forms.get(".".join(map(str, path[:-1]))) if path[-1] == "weight" else None
        if form is None:
            fill(params, path, _read(tensors, of_one, shapes[path], dtype))
        elif kept:
            _fill_narrow(params, path, of_one, tensors, form)
        else:
            whole = _read(tensors, of_one, shapes[path], dtype)
            whole = whole.astype(jax.dtypes.canonicalize_dtype(whole.dtype), copy=False)
            fill_quantized(params, path, put(whole, params[path].sharding), form)
        done += _size(params[path])
        if progress is not None:
            progress(done, total)
    return nnx.merge(graph, nnx.from_flat_state(params))


def _kept(parts: Mapping[Place, Experts], tensors: Tensors) -> dict[str, Format]:
    """Forms that matrices have in the files and keep."""
    forms = {}
    for path, of_one in parts.items():
        name = ".".join(map(str, path[:-1]))
        if path[-1] == "weight" and path[0] == "layers" and (form := stored_form(name, of_one, tensors)):
            forms[name] = form
    return forms


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) * int(np.dtype(leaf.dtype).itemsize)


def _fill_narrow(params: Parameters, path: Place, of_one: Experts, tensors: Tensors, form: Format) -> None:
    """Put a matrix in as its file holds it: codes, scales and zeros."""
    codes, scales, zeros = read_narrow(of_one, tensors, form)
    fill(params, path, codes)
    fill(params, beside(path, SCALES), scales)
    if zeros is not None:
        fill(params, beside(path, ZEROS), zeros)


def _read(tensors: Tensors, experts: Experts, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A parameter, in the dtypes of its tensors; that of all experts in ``dtype``, expert by expert into its place."""
    if len(experts) == 1:
        return read_joined([tensors[part.name] for part in experts[0]], experts[0]).reshape(shape)
    whole = np.empty(shape, dtype)
    for e, parts in enumerate(experts):
        whole[e] = read_joined([tensors[part.name] for part in parts], parts).reshape(shape[1:])
    return whole


def save_hf(decoder: Decoder, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (weights as they are) as a Hugging Face folder.

    Raises:
        CheckpointError: the decoder is quantized, or of a family that has no such form here.
    """
    params = nnx.to_flat_state(nnx.state(decoder))
    if not all(is_weight(path) for path, _ in params):
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
