"""Converts a checkpoint folder between Hugging Face safetensors and Orbax.

  python scripts/convert_checkpoint.py --source=Qwen3-4B --target=qwen3-4b-orbax               to Orbax
  python scripts/convert_checkpoint.py --source=qwen3-4b-orbax --target=Qwen3-4B --to=hf       and back
  python scripts/convert_checkpoint.py --source=Qwen3-4B --target=small --dtype=bfloat16       cast on the way
  python scripts/convert_checkpoint.py --source=Qwen3-4B --target=smaller --quantize=int8      to 8-bit weights

Configuration, tokenizer and chat template are copied along; the engine serves either kind of folder. Tensors are read
one at a time, so that memory holds little more than one copy of the model.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from absl import flags
from rich.console import Console

from astraea_jax.engine.config import DTYPES
from astraea_jax.frontends.flags import run_main
from astraea_jax.frontends.progress import StartupDisplay
from astraea_jax.models import resolve
from astraea_jax.models.checkpoint import copy_beside, load, save_hf, save_orbax
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.quantize import EIGHT_BITS

FLAGS = flags.FLAGS
flags.DEFINE_string("source", None, "Folder to read, of either kind, or the name of a bundled model.", required=True)
flags.DEFINE_string("target", None, "Folder to write; it must not hold a checkpoint yet.", required=True)
flags.DEFINE_enum("to", "orbax", ("orbax", "hf"), "Kind of folder to write.")
flags.DEFINE_enum("dtype", "bfloat16", DTYPES, "Dtype of the weights written.")
flags.DEFINE_enum("quantize", None, list(EIGHT_BITS), "8-bit dtype of the layers' weight matrices; to Orbax only.")


def main(_: list[str]) -> None:
    target = Path(FLAGS.target)
    try:
        if (target / "config.json").exists():
            raise CheckpointError(f"{target} holds a checkpoint already; choose another --target")
        source = resolve(FLAGS.source)
        with StartupDisplay() as display:
            quantized = EIGHT_BITS.get(FLAGS.quantize)
            decoder = load(source, jnp.dtype(FLAGS.dtype), quantized_dtype=quantized, progress=display.loading)
        (save_orbax if FLAGS.to == "orbax" else save_hf)(decoder, target)
        copy_beside(source, target)
    except CheckpointError as error:
        raise SystemExit(f"cannot convert: {error}") from None
    Console(stderr=True).print(f"written: {target}")


if __name__ == "__main__":
    run_main(main)
