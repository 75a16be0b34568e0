"""Weights in and out with Orbax: the arrays of a decoder, and the forms of its matrices."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from .config import CheckpointError, ModelConfig
from .config_file import read_json
from .decoder import Decoder
from .families import read_config, to_hf
from .formats import LARGEST, Format
from .hf_layout import HEAD
from .matrix import everywhere
from .parameters import Parameters, fill_all, matrix_forms
from .sharding import abstract_decoder, default_mesh

ORBAX = "orbax"
"""Subfolder of the arrays of an Orbax checkpoint; config and tokenizer lie beside it as in a Hugging Face folder."""
FORMS = "forms.json"
"""File with the form of each matrix that has one; a folder of wide weights lacks it."""


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
    if forms := matrix_forms(decoder):
        (folder / FORMS).write_text(json.dumps({path: asdict(form) for path, form in forms.items()}, indent=1) + "\n")


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
        CheckpointError: the arrays are damaged, do not fit ``config.json``, or are quantized to another form.
    """
    config = read_config(read_json(folder / "config.json"), max_context)
    mesh = mesh or default_mesh()
    kept = stored_forms(folder)
    if quantize is not None and (names := {form.codes for form in kept.values()} - {quantize.codes}):
        raise CheckpointError(f"{folder} is quantized to {', '.join(sorted(names))}, not to {quantize.codes}")
    config, graph, state = _restored(folder, config, dtype, mesh, kept)
    if quantize is None or kept:
        return nnx.merge(graph, state)
    full = dict(nnx.to_flat_state(state))
    del state
    decoder = abstract_decoder(config, dtype, mesh, forms=everywhere(quantize))
    forms = matrix_forms(decoder)
    graph, shapes = nnx.split(decoder)
    params: Parameters = dict(nnx.to_flat_state(shapes))
    fill_all(params, full, forms)
    return nnx.merge(graph, nnx.from_flat_state(params))


def stored_forms(folder: Path) -> dict[str, Format]:
    """Forms of the matrices in an Orbax folder, by :func:`.parameters.matrix_forms`' paths.

    Raises:
        CheckpointError: the file that says so is damaged.
    """
    forms = {}
    for path, fields in read_json(folder / FORMS, missing={}).items():
        try:
            form = Format(**fields)
        except TypeError as error:
            raise CheckpointError(f"{folder / FORMS}: {path} has a form that is unknown: {error}") from error
        if (
            form.codes not in [*LARGEST]
            or form.scales not in ["float32", "float16", "bfloat16"]
            or type(form.zeros) is not bool
            or any(type(n) is not int or n < 1 for n in (form.inputs or 1, form.outputs))
        ):
            raise CheckpointError(f"{folder / FORMS}: {path} has a form that is unknown: {fields!r}")
        forms[path] = form
    return forms


def _restored(
    folder: Path, config: ModelConfig, dtype: Any, mesh: Mesh, kept: dict[str, Format]
) -> tuple[ModelConfig, Any, Any]:
    """The configuration that holds, and the graph and state of the decoder as it was saved."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata((folder / ORBAX).absolute()).item_metadata.tree
            found = {".".join(str(key.key) for key in path): leaf for path, leaf in _leaves(stored)}
            if HEAD in found:  # may be one that differs from the embedding, in spite of config.json
                config = replace(config, tie_embeddings=False)
            graph, state = nnx.split(abstract_decoder(config, dtype, mesh, forms=kept.get))
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
    return config, graph, state


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))[0]
