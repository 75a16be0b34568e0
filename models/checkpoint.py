"""Weights in and out: Hugging Face safetensors and Orbax.

A Hugging Face folder is read tensor by tensor, each put on the device and dropped, so that the host never holds much
more than one copy of the model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .config import CheckpointError, ModelConfig, read_json
from .decoder import Decoder

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
    "input_norm.scale": "input_layernorm",
    "post_attention_norm.scale": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm.scale": "self_attn.q_norm",
    "attention.k_norm.scale": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Our parameter -> Hugging Face module; the tensor is its ``weight``, or its ``bias`` where ours ends in ``_bias``."""


def hf_name(path: tuple[Any, ...]) -> str:
    """Hugging Face name of the parameter at ``path``, such as ``("layers", 0, "attention", "q")``."""
    parts = [str(part) for part in path]
    kind = "weight"
    if parts[-1].endswith("_bias"):
        parts[-1], kind = parts[-1].removesuffix("_bias"), "bias"
    if parts[0] != "layers":
        return f"{TOP['.'.join(parts)]}.{kind}"
    return f"model.layers.{parts[1]}.{LAYER['.'.join(parts[2:])]}.{kind}"


def hf_shape(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of that tensor there: ``[out, in]`` for projections, heads merged."""
    if path[0] == "embed":
        return shape
    if len(shape) == 1 or str(path[-1]).endswith("_bias"):
        return (math.prod(shape),)
    inputs = 2 if path[-1] == "o" else 1
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def load(folder: Path, dtype: Any, *, progress: Progress | None = None) -> Decoder:
    """The decoder in a Hugging Face or Orbax folder.

    Raises:
        CheckpointError: the folder cannot be served; the message names the file or tensor.
    """
    if (folder / ORBAX).is_dir():
        return load_orbax(folder, dtype)
    return load_hf(folder, dtype, progress=progress)


def load_hf(folder: Path, dtype: Any, *, progress: Progress | None = None) -> Decoder:
    """Read ``config.json`` and the safetensors of a Hugging Face folder; weights are cast to ``dtype``.

    Raises:
        CheckpointError: as :func:`load`.
    """
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    graph, state = _abstract(config, dtype)
    params = dict(nnx.to_flat_state(state))
    names = {hf_name(path): path for path in params}
    total = sum(math.prod(leaf.shape) for leaf in params.values()) * np.dtype(dtype).itemsize
    done = 0
    with ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        _check_names(folder, set(names), set(tensors), config)
        for name, path in names.items():
            leaf = params[path]
            params[path] = leaf.replace(_read(tensors[name], name, path, leaf.shape, dtype))
            done += math.prod(leaf.shape) * np.dtype(dtype).itemsize
            if progress is not None:
                progress(done, total)
    return nnx.merge(graph, nnx.from_flat_state(params))


def save_hf(decoder: Decoder, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (weights as they are) as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, leaf in nnx.to_flat_state(nnx.state(decoder)):
        array = np.asarray(leaf[...])
        there = hf_shape(path, array.shape)
        tensors[hf_name(path)] = np.ascontiguousarray(
            array.reshape(there[::-1]).T if len(there) == 2 and path[0] != "embed" else array.reshape(there)
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


def load_orbax(folder: Path, dtype: Any) -> Decoder:
    """Read what :func:`save_orbax` wrote; weights are cast to ``dtype``.

    Raises:
        CheckpointError: the arrays are damaged or do not fit ``config.json``.
    """
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    graph, state = _abstract(config, dtype)
    wanted = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata((folder / ORBAX).absolute()).item_metadata.tree
            found = {".".join(str(key.key) for key in path): leaf.shape for path, leaf in _leaves(stored)}
            if wanted != found:  # asked before the restore, which leaves its reads unawaited when one fails
                differ = sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))
                raise CheckpointError(f"{folder / ORBAX} does not fit its config.json: {', '.join(differ[:5])}")
            arrays = checkpointer.restore((folder / ORBAX).absolute(), nnx.to_pure_dict(state))
    except (ValueError, KeyError, AttributeError, FileNotFoundError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / ORBAX} is damaged: {error}") from error
    nnx.replace_by_pure_dict(state, arrays)
    return nnx.merge(graph, state)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))[0]


def copy_beside(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and chat template from one checkpoint folder to another."""
    for name in BESIDE:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copy(source / name, target / name)


def random_decoder(config: ModelConfig, dtype: Any, seed: int) -> Decoder:
    """Random weights, made on the device; nothing passes through the host."""
    graph, _ = _abstract(config, dtype)
    state = jax.jit(lambda: nnx.state(Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed))))()
    return nnx.merge(graph, state)


def _abstract(config: ModelConfig, dtype: Any) -> tuple[Any, Any]:
    """Graph and state of a decoder without arrays."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))))


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


def _read(file: Any, name: str, path: tuple[Any, ...], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    there = hf_shape(path, shape)
    try:
        array = file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"tensor {name} cannot be read: {error}") from error
    if array.shape != there:
        raise CheckpointError(f"tensor {name} has shape {array.shape}; config.json makes it {there}")
    if len(there) == 2 and path[0] != "embed":
        array = array.T
    return jnp.asarray(array.reshape(shape), dtype)
