"""Decoder definitions, their configurations, checkpoint readers and tokenizers.

Imported as ``astraea_jax.models``; imports nothing of ``astraea_jax`` and nothing of ``scheduler``.
"""

from __future__ import annotations

from pathlib import Path

from .config import CheckpointError

BUNDLED = Path(__file__).parent
"""Folder of the models that come with the package."""


def resolve(model: str | Path) -> Path:
    """Folder of a model: a path, or the name of a bundled one.

    Raises:
        CheckpointError: there is no such folder.
    """
    for folder in (Path(model), BUNDLED / model):
        if (folder / "config.json").is_file():
            return folder
    bundled = ", ".join(sorted(path.parent.name for path in BUNDLED.glob("*/config.json")))
    raise CheckpointError(f"{str(model)!r} is neither a folder with a config.json nor a bundled model ({bundled})")
