"""Measures what weights and KV of fewer bits change in a model's predictions, against full precision.

python scripts/eval_precision.py                                   astraea-tiny, on solved shop tasks it never saw
python scripts/eval_precision.py --random_weights                  the same with random weights
python scripts/eval_precision.py --model=Qwen3-4B --text=book.txt  another model, on a text

Every token of a text (of the tasks: every token that the model has to write) is predicted from what comes before it,
through the pages of the reference attention. Reported are the mean Kullback-Leibler divergence from full precision, its
99th percentile, how often the most probable token is the same, and the perplexity of the texts. For answers instead of
predictions there is eval_tiny.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from astraea_jax.agents.tools import tool
from astraea_jax.engine.config import DTYPES, KV_DTYPES, EngineConfig
from astraea_jax.engine.mixtures import operations
from astraea_jax.frontends.flags import run_main
from astraea_jax.kernels import Batch, Reference
from astraea_jax.lab.shop import make_tasks
from astraea_jax.models import resolve
from astraea_jax.models.checkpoint import load, random_decoder
from astraea_jax.models.config_file import read_json
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.families import read_config
from astraea_jax.models.formats import FORMATS, Format
from astraea_jax.models.sharding import default_mesh
from astraea_jax.models.tokenizer import Tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "astraea-tiny", "Checkpoint folder or bundled name.")
flags.DEFINE_bool("random_weights", False, "Random weights in the shape of the model.")
flags.DEFINE_string("text", None, "Text file; by default held-out shop tasks and their solutions.")
flags.DEFINE_integer("tasks", 100, "Shop tasks.", lower_bound=1)
flags.DEFINE_integer("seed", 100, "Seed of the tasks; training used 0 and its own evaluation 1.")
flags.DEFINE_integer("length", 384, "Tokens that are predicted together; a file is cut into such pieces.", 16)
flags.DEFINE_enum("dtype", None, DTYPES, "Full precision; by default float32 on a CPU, bfloat16 elsewhere.")

PAGE = 16
console = Console()


@dataclass(frozen=True)
class Option:
    name: str
    form: str | None
    """Key of :data:`FORMS`."""
    kv_dtype: str | None


FORMS: dict[str, Format] = FORMATS | {
    "fp8 128x128": Format("fp8", 128, 128),
    "int4 by 32": Format("int4", 32, scales="float16"),
    "mxfp4": Format("fp4", 32, scales="bfloat16"),
}
"""Form of the layers' matrices by name: those of ``--quantize``, and those of files."""
OPTIONS = [
    Option(", ".join(filter(None, (w and f"{w} weights", kv and f"{kv} KV"))) or "full precision", w, kv)
    for kv in (None, *KV_DTYPES)
    for w in (None, *FORMS)
    if not kv or w in (None, *FORMATS)
]


class Text(NamedTuple):
    tokens: list[int]
    asked: list[bool]
    """Whether the prediction of each token counts. In a chat only tokens that the model writes count: it has never
    learned to predict the others."""


def texts(tokenizer: Tokenizer) -> Iterator[Text]:
    """The texts to predict, none of them longer than ``--length``."""
    if FLAGS.text is not None:
        tokens = tokenizer.encode(Path(FLAGS.text).read_text())
        for at in range(0, len(tokens) - 1, FLAGS.length):
            piece = tokens[at : at + FLAGS.length]
            yield Text(piece, [i > 0 for i in range(len(piece))])
        return
    for task in make_tasks(seed=FLAGS.seed, split="test", count=FLAGS.tasks):
        schemas, chat = [tool(function).schema() for function in task.tools()], task.solution()
        tokens = tokenizer.encode(tokenizer.render(chat, schemas, add_generation_prompt=False))
        asked = [False] * len(tokens)
        for i, message in enumerate(chat):
            if message["role"] == "assistant":
                first, end = (
                    len(tokenizer.encode(tokenizer.render(part, schemas, add_generation_prompt=prompt)))
                    for part, prompt in ((chat[:i], True), (chat[: i + 1], False))
                )
                while (
                    tokens[end - 1] not in tokenizer.eos_ids
                ):  # the model need not predict what the template adds after it
                    end -= 1
                asked[first:end] = [True] * (end - first)
        yield Text(tokens[: FLAGS.length], asked[: FLAGS.length])


Predict = Callable[[np.ndarray, int], jax.Array]
"""``predict(tokens [length], n)``: log-probabilities ``[length, V]`` of the token after each of the first n."""


def predictor(decoder: Decoder, kv_dtype: jnp.dtype) -> Predict:
    """Compile the predictions of a model whose attention reads keys and values from pages of ``kv_dtype``."""
    c, length, backend = decoder.config, FLAGS.length, Reference()
    count = -(-length // PAGE)
    shape = (count + 1, *backend.page_shape(c.num_kv_heads, PAGE, c.head_dim, kv_dtype))
    table, at = jnp.arange(1, count + 1)[None], jnp.arange(length)

    def predict(decoder: Decoder, tokens: jax.Array, n: jax.Array) -> jax.Array:
        pages = (jnp.zeros(shape, backend.page_dtype(kv_dtype)),) * c.num_layers
        where = Batch(table, n[None], jnp.stack([0, n]), jnp.where(at < n, at + PAGE, 0))
        attend = lambda _, heads, p: backend.attend(heads, p, where, q_tile=16)  # noqa: E731
        hidden, _ = decoder(tokens, at, pages, operations(attend, backend, default_mesh()))
        return jax.nn.log_softmax(decoder.logits(hidden))

    graph, state = nnx.split(decoder)
    jitted = jax.jit(lambda state, tokens, n: predict(nnx.merge(graph, state), tokens, n))
    return lambda tokens, n: jitted(state, tokens, n)


@dataclass
class Differences:
    """Differences of an option from full precision, one number per token."""

    divergences: list[np.ndarray] = field(default_factory=list)
    same: list[np.ndarray] = field(default_factory=list)
    losses: list[np.ndarray] = field(default_factory=list)

    def add(self, full: np.ndarray, other: np.ndarray, following: np.ndarray) -> None:
        """Compare log-probabilities ``[n, V]`` in full and other precision; ``following [n]`` are the next tokens."""
        self.divergences.append((np.exp(full) * (full - other)).sum(-1))
        self.same.append(full.argmax(-1) == other.argmax(-1))
        self.losses.append(-other[np.arange(len(following)), following])

    def row(self) -> tuple[str, ...]:
        divergence, same, loss = map(np.concatenate, (self.divergences, self.same, self.losses))
        figures = (f"{divergence.mean():.1e}", f"{np.quantile(divergence, 0.99):.1e}", f"{same.mean():.2%}")
        return (*figures, f"{np.exp(loss.mean()):.4f}")


def decoder_of(folder: Path, dtype: Any, form: Format | None) -> Decoder:
    """The model with its weights or random ones, which are the same for every form."""
    if FLAGS.random_weights:
        return random_decoder(read_config(read_json(folder / "config.json")), dtype, 0, quantize=form)
    return load(folder, dtype, quantize=form)


def main(_: list[str]) -> None:
    folder = resolve(FLAGS.model)
    configs = {o: EngineConfig(dtype=FLAGS.dtype, kv_dtype=o.kv_dtype) for o in OPTIONS}
    full_dtype = EngineConfig(dtype=FLAGS.dtype).weight_dtype()
    decoders = {form: decoder_of(folder, full_dtype, FORMS[form] if form else None) for form in (None, *FORMS)}
    sizes = {name: sum(x.nbytes for x in jax.tree.leaves(nnx.state(d))) for name, d in decoders.items()}
    predictors = {o: predictor(decoders[o.form], c.page_dtype()) for o, c in configs.items()}
    differences = {option: Differences() for option in OPTIONS}
    for text in track(list(texts(Tokenizer.from_folder(folder))), "texts", console=console):
        length, asked = len(text.tokens), np.flatnonzero(text.asked)
        tokens = np.zeros(FLAGS.length, np.int32)
        tokens[:length] = text.tokens
        full = np.asarray(predictors[OPTIONS[0]](tokens, length))[asked - 1]
        for option, predict in predictors.items():
            other = full if option is OPTIONS[0] else np.asarray(predict(tokens, length))[asked - 1]
            differences[option].add(full, other, tokens[asked])
    count = sum(map(len, differences[OPTIONS[0]].same))
    table = Table(title=f"{FLAGS.model}, {full_dtype}: {count} predictions")
    for column in ("", "weights", "mean KL", "99 %", "same token", "perplexity"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for option in OPTIONS:
        table.add_row(option.name, f"{sizes[option.form] / 2**20:.2f} MiB", *differences[option].row())
    console.print(table)


if __name__ == "__main__":
    run_main(main)
