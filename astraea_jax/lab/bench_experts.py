"""Measures the experts of one layer against the roofline of this machine.

One line per form of the matrices and number of tokens: time of the grouped products with all that belongs to them
(dispatch, gathering, activation, sum), and its share of the floor, which is the time to read once what the chosen
experts consist of, or to multiply at the rate of a matrix product, both measured here. Experts are chosen at random.

  python scripts/bench_experts.py                       Qwen3-Coder-30B-A3B's on a GPU; a few of gpt-oss-20b on a CPU
  python scripts/bench_experts.py --model=gpt-oss-20b --forms=mxfp4,bf16 --tokens=1,8,64
  python scripts/bench_experts.py --tiles=64x128x4x4,32x128x4x5       (outputs x inputs x warps x stages, on a GPU)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from rich.console import Console

from astraea_jax.engine.config import EngineConfig
from astraea_jax.frontends.flags import run_main
from astraea_jax.kernels import Native, grouped_product
from astraea_jax.kernels.grouped import GroupedProduct, mixed
from astraea_jax.kernels.grouped_triton import GroupedTriton, Tiles
from astraea_jax.kernels.native.products import put_in_panels
from astraea_jax.lab.ahead import FORMS
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.roofline import Roofline, best_seconds
from astraea_jax.models.experts import Mixture
from astraea_jax.models.matrix import plain, within
from astraea_jax.models.published import PUBLISHED

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Shape of the experts; by default qwen3-coder-30b-a3b on a GPU.")
flags.DEFINE_list("forms", None, f"Some of {', '.join(['plain', *FORMS])}.")
flags.DEFINE_list("tokens", None, "Tokens of a step; by default 1,8,64,512,2048 on a GPU.")
flags.DEFINE_list("tiles", ["-"], "Tiles of the Triton kernel; -: its own choice.")
flags.DEFINE_integer("layers", 4, "Layers that a step goes through, so that no cache holds them.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Measurements of a few steps; the shortest counts.", lower_bound=1)
define_flags("bench_experts")

console = Console()


@dataclass(frozen=True)
class Figure:
    form: str
    tokens: int
    tiles: str
    read: int
    """Bytes of the experts that some token chose."""
    ms: float
    """Milliseconds per layer."""
    floor_ms: float


def mixtures(form: str, dtype: Any) -> list[Mixture]:
    """Mixtures of a few layers with random weights, as this device reads them, without shared experts."""
    model = PUBLISHED[FLAGS.model]
    assert model.experts is not None
    model = replace(model, experts=replace(model.experts, shared_size=0))
    forms = within(plain if form == "plain" else FORMS[form], "layers.0")
    make = nnx.jit(lambda seed: Mixture(model, dtype, forms, nnx.Rngs(seed)))
    made = [make(jnp.int32(seed)) for seed in range(FLAGS.layers)]
    if isinstance(EngineConfig().backend(model), Native):
        for mixture in made:
            put_in_panels(mixture)
    return made


def grouped_by(tiles: str) -> GroupedProduct:
    grouped = grouped_product(jax.default_backend(), EngineConfig().backend(PUBLISHED[FLAGS.model]))
    if tiles == "-" or not isinstance(grouped, GroupedTriton):
        return grouped
    return replace(grouped, chosen=Tiles(*map(int, tiles.split("x"))))


def measured(form: str, dtype: Any, roofline: Roofline) -> Iterator[Figure]:
    """All numbers of tokens, one after the other."""
    layers = mixtures(form, dtype)
    experts = layers[0].experts
    graph, states = nnx.split(layers[0])[0], [nnx.split(layer)[1] for layer in layers]
    matrices = [x for m in (layers[0].gate_up, layers[0].down) for x in jax.tree.leaves(nnx.state(m))]
    of_expert = sum(x.nbytes for x in matrices) // experts.count
    width = PUBLISHED[FLAGS.model].hidden_size
    for tokens in map(int, FLAGS.tokens):
        rng = np.random.default_rng(tokens)
        index = np.stack([rng.permutation(experts.count)[: experts.chosen] for _ in range(tokens)]).astype(np.int32)
        weights = jnp.full(index.shape, 1 / experts.chosen, jnp.float32)
        x = jax.random.normal(jax.random.key(tokens), (tokens, width)).astype(dtype)
        read = of_expert * len(np.unique(index))
        operations = 2 * 3 * width * experts.size * index.size
        floor = max(roofline.read_s(read), roofline.matmul_s(operations))
        for tiles in FLAGS.tiles:
            step = jax.jit(partial(_through_layers, grouped_by(tiles), graph))
            seconds = best_seconds(partial(step, states, x, jnp.asarray(index), weights), FLAGS.repeats)
            yield Figure(form, tokens, tiles, read, 1e3 * seconds / len(states), 1e3 * floor)


def _through_layers(
    grouped: GroupedProduct, graph: Any, states: list[Any], x: jax.Array, index: jax.Array, weights: jax.Array
) -> jax.Array:
    for state in states:  # one layer's output is the next one's input, so that they run one after the other
        x = mixed(grouped, x, index, weights, nnx.merge(graph, state))
    return x


def table(figures: list[Figure]) -> Section:
    rows = [
        (f.form, str(f.tokens), f.tiles, f"{f.read / 1e6:.1f}", f"{f.ms:.4f}", f"{f.floor_ms / f.ms:.0%}")
        for f in figures
    ]
    title = f"Experts of one layer of {FLAGS.model}"
    return Section(title, ("form", "tokens", "tiles", "MB read", "ms", "of the floor"), rows, named=3)


def main(_: list[str]) -> None:
    on_cpu = jax.default_backend() == "cpu"
    FLAGS["model"].value = FLAGS.model or ("gpt-oss-20b" if on_cpu else "qwen3-coder-30b-a3b")
    FLAGS["forms"].value = FLAGS.forms or (["mxfp4"] if on_cpu else ["plain", "fp8-block"])
    FLAGS["tokens"].value = FLAGS.tokens or (["1"] if on_cpu else ["1", "8", "64", "512", "2048"])
    if on_cpu:
        FLAGS["layers"].value = 1
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    roofline, figures = Roofline.measure(dtype), []
    for form in FLAGS.forms:
        for figure in measured(form, dtype, roofline):
            figures.append(figure)
            console.print(f"[dim]{form} {figure.tokens} {figure.tiles}: {figure.ms:.4f} ms[/]")
    publish("bench_experts", [table(figures)], {"model": FLAGS.model, "rows": [asdict(f) for f in figures]}, roofline)


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
