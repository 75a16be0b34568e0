"""Models by name: a folder, a bundled model, or an id of the Hugging Face hub, which is fetched into its usual cache.

``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` mean what they mean to every tool of the hub.
"""

from __future__ import annotations

import re
from pathlib import Path

from astraea_jax.models import resolve
from astraea_jax.models.checkpoint import BESIDE, ORBAX
from astraea_jax.models.config import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", f"{ORBAX}/**")
FETCHED = (*(name if Path(name).suffix else f"{name}/*" for name in BESIDE), *WEIGHTS)
"""What is read of a model, and nothing else: no code, no pickles, no copies of the weights in other formats."""


def find_model(model: str | Path, revision: str | None = None) -> Path:
    """Find the folder of a model, fetching it first if it is an id of the hub that the cache lacks.

    Args:
        model: a folder, the name of a bundled model, or an id such as ``"Qwen/Qwen3-0.6B"``.
        revision: a branch, tag or commit of an id; None: the newest.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched; the message says why.
    """
    try:
        folder = resolve(model)
    except CheckpointError as error:
        if Path(model).exists() or not HUB_ID.fullmatch(str(model)):
            raise
        return _fetch(str(model), revision, str(error))
    if revision is not None:
        raise CheckpointError(f"revision {revision!r} is of a hub's model, and {str(model)!r} is a folder here")
    return folder


def _fetch(model: str, revision: str | None, not_here: str) -> Path:
    from huggingface_hub import constants, errors, snapshot_download  # a second that a folder need not wait for

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(FETCHED)))
    except errors.GatedRepoError:
        why = "its authors must grant access first: ask on its page, then `hf auth login` or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = f"it has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        why = "there is no such model, or it is private and HF_TOKEN does not open it"
    except errors.LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        why = f"the cache in {constants.HF_HUB_CACHE} lacks it and {offline}"
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
    else:
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{model!r} on the hub has no config.json; a model for transformers is needed")
        return folder
    raise CheckpointError(f"{not_here}; from the hub it cannot be fetched: {why}")
