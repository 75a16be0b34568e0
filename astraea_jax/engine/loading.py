"""A model on the devices that serve it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from astraea_jax.engine.compilation import use_cache
from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.devices import check_weights, free_bytes, overlooked
from astraea_jax.errors import StartupError
from astraea_jax.models import resolve
from astraea_jax.models.checkpoint import Progress, load, random_decoder
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.config_file import read_json
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.families import read_config
from astraea_jax.models.orbax_files import ORBAX, stored_forms
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.quantization_config import quantization
from astraea_jax.models.rope import LongRope
from astraea_jax.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class ModelOnDevices(NamedTuple):
    """A model on the first of its meshes, ready for an engine on each."""

    decoder: Decoder
    tokenizer: Tokenizer
    meshes: list[Mesh]


def load_model(model: str | Path, config: EngineConfig, progress: Progress | None = None) -> ModelOnDevices:
    """Load a checkpoint folder, or the bundled ``"astraea-tiny"``.

    Raises:
        CheckpointError, StartupError: it cannot be served here.
    """
    folder = resolve(model)
    shape = read_config(read_json(folder / "config.json"), config.max_context)
    _say_which_rope(shape, config.max_context)
    meshes = _prepare(shape, config, matrix_itemsize=_stored_itemsize(folder, shape))
    dtype, form = config.weight_dtype(), config.quantized()
    decoder = load(folder, dtype, meshes[0], quantize=form, max_context=config.max_context, progress=progress)
    return ModelOnDevices(decoder, Tokenizer.from_folder(folder), meshes)


def random_model(shape: str, config: EngineConfig) -> ModelOnDevices:
    """A published shape with random weights and the tokenizer of astraea-tiny.

    Raises:
        StartupError: no such shape, or too few devices.
    """
    if shape not in PUBLISHED:
        raise StartupError(f"no published shape is called {shape!r}; there are {', '.join(PUBLISHED)}")
    meshes = _prepare(PUBLISHED[shape], config)
    decoder = random_decoder(PUBLISHED[shape], config.weight_dtype(), 0, meshes[0], quantize=config.quantized())
    return ModelOnDevices(decoder, Tokenizer.from_folder(resolve("astraea-tiny")), meshes)


def _say_which_rope(model: ModelConfig, max_context: int | None) -> None:
    if isinstance(scaling := model.rope.scaling, LongRope):
        log.info(
            "this model has rotary embeddings for short and for long contexts; those for %s ones serve all, since "
            "max_context is %d",
            "long" if scaling.long else "short",
            max_context or model.max_position,
        )


def _stored_itemsize(folder: Path, model: ModelConfig) -> float | None:
    """Bytes of a weight of the layers' matrices in a folder of fewer bits; None: in the configured dtype."""
    if (folder / ORBAX).is_dir():
        return max((form.bytes_per_weight for form in stored_forms(folder).values()), default=None)
    if quantization(read_json(folder / "config.json")) is None:
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return max((size - 2 * model.table_weights) / model.layer_weights, 0.5)  # what is not quantized has 16 bits


def _prepare(model: ModelConfig, config: EngineConfig, *, matrix_itemsize: float | None = None) -> list[Mesh]:
    """Find the devices of each replica, which have room for it.

    Its layers' matrices have ``matrix_itemsize`` bytes per weight if the configuration does not say how many.
    """
    use_cache(config.compile_cache)
    if unused := overlooked():
        log.warning(unused)
    meshes, chosen = config.meshes(model), config.quantized()
    if (free := free_bytes(meshes[0])) is not None:
        itemsize, matrix_itemsize = (
            config.weight_dtype().itemsize,
            chosen.bytes_per_weight if chosen else matrix_itemsize,
        )
        check_weights(model, itemsize, matrix_itemsize, shared=meshes[0].size, free=free, available=len(jax.devices()))
    return meshes
