"""Trains the bundled model, astraea-tiny, from nothing: tokenizer and weights, from solved shop tasks.

  python scripts/train_tiny.py                        the bundled model again, about half an hour on two cores
  python scripts/train_tiny.py --steps=200 --out=out/pilot

Only the assistant's tokens are learned. "solved" is the share of held-out tasks in which every one of them is the
most probable under the true history; since decoding is greedy, the agent then reproduces the solution word for word.
Needs optax (the dev extra).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Two devices of one thread each, with half a batch, are a third faster here than one device with two threads.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from absl import flags
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from astraea_jax.agents.tools import tool
from astraea_jax.frontends.flags import run_main
from astraea_jax.lab.shop import Task, make_tasks
from astraea_jax.models import BUNDLED
from astraea_jax.models.checkpoint import save_hf
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.heads import Heads
from astraea_jax.models.operations import Operations
from astraea_jax.models.tokenizer import Tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string("out", str(BUNDLED / "astraea-tiny"), "Folder to write; its chat template is used if there is one.")
flags.DEFINE_integer("steps", 3200, "Optimizer steps.", lower_bound=1)
flags.DEFINE_integer("tasks", 60_000, "Different training tasks.", lower_bound=100)
flags.DEFINE_integer("held_out", 500, "Held-out tasks for the evaluation.", lower_bound=1)
flags.DEFINE_integer("batch_tokens", 4096, "Tokens of a batch, padding included.", lower_bound=1024)
flags.DEFINE_float("peak_rate", 2e-3, "Highest learning rate; warm-up, then cosine decay.")
flags.DEFINE_integer("seed", 0, "Seed of tasks, weights and order.")

VOCABULARY = 768
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TEMPLATE = BUNDLED / "astraea-tiny" / "chat_template.jinja"
BUCKET = 64
"""Sequence lengths are padded to a multiple of this, so that few shapes are compiled."""

console = Console()


def model_config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position=1024,
        tie_embeddings=True,
        qk_norm=True,
    )


def solved_chat(task: Task, template: Tokenizer) -> str:
    schemas = [tool(function).schema() for function in task.tools()]
    return template.render(task.solution(), schemas, add_generation_prompt=False)


def train_tokenizer(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE that can write any text; every digit is a token of its own, so that numbers can be copied."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    markers = re.compile("|".join(map(re.escape, SPECIAL + MARKERS)))
    bpe.train_from_iterator((piece for text in texts for piece in markers.split(text)), trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bpe.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    return bpe


def write_tokenizer(folder: Path, bpe: tokenizers.Tokenizer) -> None:
    bpe.save(str(folder / "tokenizer.json"))
    ends = [bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "do_sample": False}) + "\n")


@dataclass(frozen=True)
class Examples:
    """Token sequences and, for each token, whether it is to be learned."""

    tokens: list[np.ndarray]
    learned: list[np.ndarray]

    @classmethod
    def of(cls, texts: Sequence[str], bpe: tokenizers.Tokenizer) -> Examples:
        start, end = bpe.token_to_id("<|im_start|>"), bpe.token_to_id("<|im_end|>")
        assistant = bpe.encode("<|im_start|>assistant\n", add_special_tokens=False).ids[1:]
        tokens, learned = [], []
        for encoding in bpe.encode_batch(list(texts), add_special_tokens=False):
            ids = np.array(encoding.ids, np.int32)
            mask = np.zeros(len(ids), bool)
            for at in np.flatnonzero(ids == start):
                first = at + 1 + len(assistant)
                if ids[at + 1 : first].tolist() == assistant:
                    mask[first : at + 1 + np.argmax(ids[at:] == end)] = True
            tokens.append(ids)
            learned.append(mask)
        return cls(tokens, learned)

    def batches(self, batch_tokens: int, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """``(tokens, learned)``, each ``[B, L]``, of an even number of sequences of similar length."""
        waiting: dict[int, list[int]] = {}
        for i in order:
            length = -(-len(self.tokens[i]) // BUCKET) * BUCKET
            group = waiting.setdefault(length, [])
            group.append(i)
            if len(group) == batch_tokens // length // 2 * 2:
                yield self._padded(group, length)
                group.clear()

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        return self._padded(range(len(self.tokens)), max(map(len, self.tokens)))

    def _padded(self, group: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, learned = np.zeros((len(group), length), np.int32), np.zeros((len(group), length), bool)
        for row, i in enumerate(group):
            tokens[row, : len(self.tokens[i])] = self.tokens[i]
            learned[row, : len(self.tokens[i])] = self.learned[i]
        return tokens, learned


def logits_of(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Logits of every next token, ``[B, L] -> [B, L, V]``, with plain causal attention."""
    b, length = tokens.shape

    def attend(_: int | jax.Array, heads: Heads, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = (x.reshape(b, length, *x.shape[1:]) for x in heads.rotated())
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b * length, *q.shape[2:]), cache

    positions = jnp.tile(jnp.arange(length), b)
    hidden, _ = decoder(tokens.reshape(-1), positions, (None,) * decoder.config.num_layers, Operations(attend))
    return decoder.logits(hidden).reshape(b, length, -1)


def make_steps(
    graph: nnx.GraphDef[Decoder], optimizer: optax.GradientTransformation
) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    """The jitted training step and the evaluation of a batch."""

    def loss(state: Any, tokens: jax.Array, learned: jax.Array) -> jax.Array:
        logits = logits_of(nnx.merge(graph, state), tokens)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses * learned[:, 1:]) / jnp.sum(learned[:, 1:])

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(state: Any, moments: Any, tokens: jax.Array, learned: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state, tokens, learned)
        update, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, update), moments, value

    @jax.jit
    def solved(state: Any, tokens: jax.Array, learned: jax.Array) -> jax.Array:
        right = logits_of(nnx.merge(graph, state), tokens)[:, :-1].argmax(-1) == tokens[:, 1:]
        return jnp.all(right | ~learned[:, 1:], axis=1)

    return train, solved


def evaluate(solved: Callable[..., jax.Array], state: Any, held_out: Examples) -> float:
    tokens, learned = held_out.padded()
    parts = [solved(state, tokens[i : i + 50], learned[i : i + 50]) for i in range(0, len(tokens), 50)]
    return float(np.concatenate(parts).mean())


def endless(examples: Examples, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while True:
        yield from examples.batches(FLAGS.batch_tokens, rng.permutation(len(examples.tokens)))


def fit(config: ModelConfig, training: Examples, held_out: Examples) -> Decoder:
    schedule = optax.warmup_cosine_decay_schedule(0.0, FLAGS.peak_rate, min(100, FLAGS.steps // 10 + 1), FLAGS.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    decoder = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(FLAGS.seed))
    graph, state = nnx.split(decoder)
    train, solved = make_steps(graph, optimizer)
    mesh = Mesh(np.array(jax.devices()), "data")
    whole, halves = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    state, moments = jax.device_put((state, optimizer.init(state)), whole)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task("train", total=FLAGS.steps, loss=float("nan"))
        batches = endless(training, np.random.default_rng(FLAGS.seed))
        for step in range(1, FLAGS.steps + 1):
            state, moments, value = train(state, moments, *jax.device_put(next(batches), halves))
            if step % 25 == 0:
                bar.update(shown, completed=step, loss=float(value))
            if step % 250 == 0 or step == FLAGS.steps:
                share = evaluate(solved, state, held_out)
                console.print(
                    f"step {step}: loss {float(value):.4f}, solved {share:.1%} of {FLAGS.held_out} held-out tasks"
                )
    return nnx.merge(graph, state)


def main(_: list[str]) -> None:
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / TEMPLATE.name).exists():
        shutil.copy(TEMPLATE, out)
    tasks = make_tasks(seed=FLAGS.seed, split="train", count=FLAGS.tasks)
    held_out = make_tasks(seed=FLAGS.seed + 1, split="test", count=FLAGS.held_out)
    blank = Tokenizer(
        tokenizers.Tokenizer(models.BPE()),
        bos_id=None,
        eos_ids=frozenset(),
        template=TEMPLATE.read_text(),
        special={},
    )
    texts = [solved_chat(task, blank) for task in tasks]
    bpe = train_tokenizer(texts[:5000])
    write_tokenizer(out, bpe)
    training = Examples.of(texts, bpe)
    lengths = [len(ids) for ids in training.tokens]
    console.print(f"{len(texts)} tasks of {np.mean(lengths):.0f} tokens, {max(lengths)} at most")
    decoder = fit(
        model_config(bpe.get_vocab_size()),
        training,
        Examples.of([solved_chat(t, blank) for t in held_out], bpe),
    )
    save_hf(decoder, out)
    console.print(f"written: {out}")


if __name__ == "__main__":
    run_main(main)
