"""A model on the devices that serve it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from astraea_jax.compilation import use_cache
from astraea_jax.config import EngineConfig
from astraea_jax.errors import StartupError
from astraea_jax.models import resolve
from astraea_jax.models.checkpoint import Progress, load, random_decoder
from astraea_jax.models.config import PUBLISHED, ModelConfig, read_json
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.tokenizer import Tokenizer


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
    use_cache(config.compile_cache)
    folder = resolve(model)
    meshes = config.meshes(ModelConfig.from_hf(read_json(folder / "config.json")))
    decoder = load(folder, config.weight_dtype(), meshes[0], narrow=config.narrow_dtype(), progress=progress)
    return ModelOnDevices(decoder, Tokenizer.from_folder(folder), meshes)


def random_model(shape: str, config: EngineConfig) -> ModelOnDevices:
    """A published shape with random weights and the tokenizer of astraea-tiny.

    Raises:
        StartupError: no such shape, or too few devices.
    """
    if shape not in PUBLISHED:
        raise StartupError(f"no published shape is called {shape!r}; there are {', '.join(PUBLISHED)}")
    use_cache(config.compile_cache)
    meshes = config.meshes(PUBLISHED[shape])
    decoder = random_decoder(PUBLISHED[shape], config.weight_dtype(), 0, meshes[0], narrow=config.narrow_dtype())
    return ModelOnDevices(decoder, Tokenizer.from_folder(resolve("astraea-tiny")), meshes)
