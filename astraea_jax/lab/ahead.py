"""What the serving step becomes on devices that are not here: compiled ahead of time, and held to what must be true.

A program that compiles may still be wrong for its device: it may copy the pages instead of writing into them, or bring
the weights into another layout on every step. The compiler says so in its account of memory and in the optimised
program, and both can be had without the device. Times cannot: nothing here is run.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.layout import DEVICE_KV_SHARE
from astraea_jax.engine.step import Sizes, Step
from astraea_jax.kernels import choose
from astraea_jax.kv_cache.arrays import page_bytes
from astraea_jax.kv_cache.offload import LARGEST_BLOCK, block_sharding
from astraea_jax.models.config import PUBLISHED
from astraea_jax.models.quantize import EIGHT_BITS
from astraea_jax.models.sharding import abstract_decoder, mesh_of

TEMP_BYTES = 512 * 2**20
"""Scratch memory that a program may want on each device: activations and logits of a step, a block of a transfer."""
LARGE = 2**20
"""Elements of a weight; smaller ones may be copied."""
MAX_CONTEXT = 16_384
"""Tokens: the width of the page table."""
PROGRAMS = ("decode-least", "decode-most", "mixed-most", "offload", "restore")
"""Steps with the fewest and the most tokens of their kind, and transfers of the largest block."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
RESULT = r"= \(?(\w+)\[([\d,]+)\](\S*) .*?\b([a-z][a-z-]*)\("
"""Of an instruction: dtype, shape and layout of its (first) result, and its kind."""
COPIES = ("copy", "copy-start", "transpose")
IN_PLACE = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "copy-done")
"""Kinds of instructions that make nothing; what a copy makes is judged where it starts."""


@dataclass(frozen=True)
class Target:
    """Devices of one kind."""

    topology: str
    """Of TPUs, as libtpu names it; of GPUs the file."""
    memory: int
    """Bytes of each device that JAX has."""
    capability: int | None = None
    """Compute capability of a GPU, whose description for the compiler is a file beside this module."""

    def devices(self) -> list[Any]:
        """Stand-ins for the devices; they can be compiled for, nothing else."""
        if self.capability is None:
            return list(topologies.get_topology_desc(self.topology, platform="tpu").devices)
        config = (Path(__file__).parent / "targets" / f"{self.topology}.txtpb").read_text()
        return list(topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x4").devices)


TARGETS = {
    "v5e": Target("v5e:2x2", 16 * 2**30),
    "v5p": Target("v5p:2x2x1", 95 * 2**30),
    "v6e": Target("v6e:2x2", 32 * 2**30),
    "7x": Target("tpu7x:2x2x1", 96 * 2**30),
    "a100": Target("a100", 85 * 10**9 * 3 // 4, 80),
    "h200": Target("h200", 141 * 10**9 * 3 // 4, 90),
    "b200": Target("b200", 180 * 10**9 * 3 // 4, 100),
}
"""A tpu7x chip of 192 GiB is two devices; of a GPU's memory JAX takes three quarters unless told otherwise."""


@dataclass(frozen=True)
class Case:
    """A model on a mesh."""

    target: str
    model: str
    tp: int
    attention: str | None = None
    """None: what the engine would take."""
    scan: bool | None = None
    """The layers are one loop. None: as the engine would do it."""
    quantize: str | None = None
    """See :class:`~astraea_jax.engine.config.EngineConfig`, as the next."""
    kv_dtype: str | None = None


@dataclass
class Figures:
    """Of one compiled program, per device."""

    case: Case
    program: str
    arguments: int = 0
    """Bytes."""
    aliased: int = 0
    """Bytes of the arguments that are the result's memory, too."""
    temp: int = 0
    """Bytes of scratch memory."""
    collectives: dict[str, int] = field(default_factory=dict)
    """How many of a kind the program has; those of a loop count once."""
    seconds: float = 0.0
    """To trace, lower and compile it here."""
    failures: list[str] = field(default_factory=list)
    """Gates that it does not pass."""


@dataclass(frozen=True)
class _Program:
    """Something to compile, and what must be true of it."""

    name: str
    lower: Callable[[], Any]
    aliased: int
    """Bytes of the pages that it must write in place."""
    pages: set[int]
    """Elements of arrays of pages, which it must not copy."""
    weights: set[int]
    """Elements of weights, which it must not make anew."""
    shared_layers: int
    """Layers in its text that the devices compute together; 0: each works alone."""


class Unfit(Exception):
    """The model's weights leave no room for pages on these devices."""


def compile_case(
    case: Case, programs: Collection[str] = PROGRAMS, on_program: Callable[[str], None] = lambda name: None
) -> Iterator[Figures]:
    """Compile the programs of these names, one after the other; what does not compile is a failure of its figures.

    Args:
        case: what for.
        programs: some of :data:`PROGRAMS`.
        on_program: told the name of each program before it is compiled.

    Raises:
        Unfit: the weights leave no room, with the numbers.
        StartupError: this attention cannot be had there.
    """
    target = TARGETS[case.target]
    mesh = mesh_of(target.devices()[: case.tp])
    step = serving_step(case, mesh)
    case = replace(case, attention=step.backend.name, scan=step.stacked)
    with jax.default_device(mesh.devices.flat[0]):  # kernels ask it for its kind
        for program in _programs(step, case.tp):
            if program.name in programs:
                on_program(program.name)
                yield _compile(case, program)


def serving_step(case: Case, mesh: Mesh) -> Step:
    """The step with the engine's default sizes, and as many pages as the devices hold beside the weights.

    Raises:
        Unfit: they hold less than one context of MAX_CONTEXT tokens.
        StartupError: this attention cannot be had there.
    """
    config, model, dtype = EngineConfig(), PUBLISHED[case.model], jnp.dtype(jnp.bfloat16)
    target = TARGETS[case.target]
    scan = target.capability is None if case.scan is None else case.scan
    narrow = EIGHT_BITS[case.quantize] if case.quantize else None
    kv_dtype = EIGHT_BITS[case.kv_dtype] if case.kv_dtype else dtype
    decoder = abstract_decoder(model, dtype, mesh, narrow=narrow, stacked=scan)
    backend = choose(
        case.attention,
        "tpu" if target.capability is None else "gpu",
        kv_heads=model.num_kv_heads // case.tp,
        head_dim=model.head_dim,
        page_size=config.page_size,
        dtype=kv_dtype,
        compute_capability=target.capability,
    )
    weights = sum(map(_shard_bytes, jax.tree.leaves(nnx.state(decoder))))
    page = page_bytes(model, backend, config.page_size, kv_dtype, case.tp) // case.tp
    count = int(DEVICE_KV_SHARE * (target.memory - weights)) // page
    if count * config.page_size < MAX_CONTEXT:
        raise Unfit(
            f"{weights / 1e9:.1f} GB of weights leave too little of {target.memory / 1e9:.1f} GB for the pages of "
            f"{MAX_CONTEXT} tokens"
        )
    width = MAX_CONTEXT // config.page_size
    sizes = Sizes(count, config.page_size, config.max_seqs, config.max_step_tokens, width, kv_dtype)
    return Step(decoder, backend, sizes, mesh)


def _programs(step: Step, tp: int) -> Iterator[_Program]:
    pages, in_text = step.pages, 1 if step.stacked else step.layers
    pool, of_layer = sum(map(_shard_bytes, pages)), _shard_elements(pages[0]) * len(pages) // step.layers
    paged = {of_layer, _shard_elements(pages[0])}
    weights = {_shard_elements(leaf) for leaf in step.leaves if len(leaf.shape) > 1}
    if step.stacked:  # the layers' matrices have three axes
        weights |= {_shard_elements(leaf) // step.layers for leaf in step.leaves if len(leaf.shape) > 2}
    weights = {elements for elements in weights if elements >= LARGE}
    decode = [shape for shape in step.shapes if shape.q_tile == 1]
    for name, shape in zip(PROGRAMS, (decode[0], decode[-1], step.shapes[-1])):
        lower = lambda shape=shape: step.jitted(shape).lower(*step.arguments(shape))  # noqa: E731
        yield _Program(name, lower, pool, paged, weights, in_text if tp > 1 else 0)
    gather, scatter = step.transfers()
    ids = jax.ShapeDtypeStruct((LARGEST_BLOCK,), jnp.int32, sharding=step.whole)
    whole = (LARGEST_BLOCK, step.layers, *pages[0].shape[1:])
    block = jax.ShapeDtypeStruct(whole, pages[0].dtype, sharding=block_sharding(pages[0]))
    yield _Program("offload", lambda: gather.lower(pages, ids), 0, paged, set(), 0)
    yield _Program("restore", lambda: scatter.lower(pages, block, ids), pool, paged, set(), 0)


def _compile(case: Case, program: _Program) -> Figures:
    figures = Figures(case, program.name)
    began = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except Exception as error:  # whatever the compiler or a kernel says is the finding
        figures.failures.append(f"does not compile: {str(error).splitlines()[0][:300]}")
        return figures
    finally:
        figures.seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    figures.arguments = memory.argument_size_in_bytes
    figures.aliased = memory.alias_size_in_bytes
    figures.temp = memory.temp_size_in_bytes
    found = collectives(text)
    figures.collectives = dict(found)
    if figures.aliased < program.aliased:
        figures.failures.append(f"writes {(program.aliased - figures.aliased) / 1e9:.2f} GB of pages elsewhere")
    if figures.temp > TEMP_BYTES:
        figures.failures.append(f"wants {figures.temp / 1e9:.2f} GB of scratch memory")
    figures.failures += [f"moves {what}" for what in moved(text, program.pages, program.weights)]
    figures.failures += wrong_collectives(found, program.shared_layers)
    return figures


def _shard_elements(array: jax.ShapeDtypeStruct) -> int:
    """Elements on each device."""
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape))


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes on each device."""
    return _shard_elements(array) * int(array.dtype.itemsize)


def collectives(program: str) -> Counter[str]:
    """How often an optimised program, as text, has its devices exchange something, by kind."""
    return Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", program))


def wrong_collectives(found: Counter[str], layers: int) -> list[str]:
    """What the devices exchange beyond, or short of, what dividing the model needs.

    Per layer two sums, after attention and after the feed-forward; one of the embeddings, since each device has the
    vectors of its share of V; one exchange of logits, from shares of V to shares of the rows; and the sampled tokens
    brought to every device, by a sum or a gather. A device alone exchanges nothing.

    Args:
        found: see :func:`collectives`.
        layers: that devices compute together; 0: each works alone.
    """
    sums = found["all-reduce"] + found["all-gather"]
    others = found.total() - sums - found["all-to-all"]
    if layers and (sums, found["all-to-all"], others) == (2 * layers + 2, 1, 0) and found["all-gather"] <= 1:
        return []
    if not layers and not found:
        return []
    wanted = f"{2 * layers + 2} sums and 1 all-to-all" if layers else "nothing"
    return [f"exchanges {', '.join(f'{n} {kind}' for kind, n in sorted(found.items())) or 'nothing'}, not {wanted}"]


def moved(program: str, pages: set[int], weights: set[int]) -> list[str]:
    """What an optimised program brings to another place or into another order and should not: pages by a copy, weights
    by anything. Results in the fast memory of the chip (``S(1)`` in their layout) are read ahead.

    Args:
        program: as text.
        pages: elements of arrays of pages.
        weights: elements of weights, and of one layer's if they are stacked.
    """
    found = []
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.-]+)", program))  # inside, a copy says in which order it is read
    for name, computation in re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*{\n(.*?)^}", program, re.M | re.S):
        if name in fused:
            continue
        for dtype, shape, layout, kind in re.findall(RESULT, computation, re.M):
            size = math.prod(map(int, shape.split(",")))
            made = size in weights and kind not in IN_PLACE and dtype != "f32"  # that is sums, as large by chance
            if "S(1)" not in layout and (made or (size in pages and kind in COPIES)):
                found.append(f"{dtype}[{shape}] by {kind}")
    return found
