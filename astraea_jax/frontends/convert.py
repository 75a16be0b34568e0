"""Converts a checkpoint folder between Hugging Face safetensors and Orbax.

  astraea-jax convert Qwen/Qwen3-4B qwen3-4b-orbax                 to Orbax, from the hub or a folder
  astraea-jax convert qwen3-4b-orbax Qwen3-4B --to=hf              and back
  astraea-jax convert Qwen3-4B small --dtype=bfloat16              cast on the way
  astraea-jax convert Qwen3-4B smaller --quantize=int8             to weights of 8 bits, or of 4 (int4)

(python scripts/convert_checkpoint.py does the same in a checkout.)

Configuration, tokenizer and chat template are copied along; the engine serves either kind of folder. Tensors are read
one at a time, so that memory holds little more than one copy of the model.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from absl import app, flags
from rich.console import Console

from astraea_jax.engine.config import DTYPES
from astraea_jax.frontends.flags import run_main
from astraea_jax.frontends.hub import find_model
from astraea_jax.frontends.progress import StartupDisplay
from astraea_jax.models.checkpoint import copy_beside, load, save_hf, save_orbax
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.formats import FORMATS

FLAGS = flags.FLAGS
flags.DEFINE_string("source", None, "Folder of either kind, bundled model, or hub id; or the first argument.")
flags.DEFINE_string("target", None, "Folder to write, without a checkpoint in it; or the second argument.")
flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub id.")
flags.DEFINE_enum("to", "orbax", ("orbax", "hf"), "Kind of folder to write.")
flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Dtype of the weights written.")
flags.DEFINE_enum("quantize", None, list(FORMATS), "Form of the layers' weight matrices; to Orbax only.")


def main(arguments: list[str]) -> None:
    """Convert the folder that the arguments or the flags name."""
    source_name, target_name = _folders(arguments[1:])
    target = Path(target_name)
    try:
        if (target / "config.json").exists():
            raise CheckpointError(f"{target} holds a checkpoint already; choose another target")
        source = find_model(source_name, FLAGS.revision)
        with StartupDisplay() as display:
            form = FORMATS.get(FLAGS.quantize)
            decoder = load(source, jnp.dtype(FLAGS.dtype), quantize=form, progress=display.loading)
        if FLAGS.to == "orbax":
            save_orbax(decoder, target, source / "config.json")
        else:
            save_hf(decoder, target)
        copy_beside(source, target)
    except CheckpointError as error:
        raise SystemExit(f"cannot convert: {error}") from None
    Console(stderr=True).print(f"written: {target}")


def _folders(arguments: list[str]) -> tuple[str, str]:
    given = [name for name in (FLAGS.source, FLAGS.target) if name is not None] or arguments
    if len(given) != 2 or (given is not arguments and arguments):
        raise app.UsageError("two folders are needed: a source and a target")
    return given[0], given[1]


def run() -> None:
    """Convert a checkpoint."""
    run_main(main, __name__)
