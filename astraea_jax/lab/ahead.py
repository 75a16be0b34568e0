"""Cross-compile the serving step for absent devices and check its memory, aliasing and collectives.

An executable that compiles may still be wrong for its device: it may copy the pages instead of writing into them, or
change the layout of the weights at every step. Both show in the compiler's memory analysis and in the optimised HLO,
which need no device. Nothing is run, so there are no times.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from astraea_jax.engine.config import EngineConfig, default_sizes
from astraea_jax.engine.layout import DEVICE_KV_SHARE
from astraea_jax.engine.page_counts import PageCounts
from astraea_jax.engine.step import Step, StepSizes
from astraea_jax.kernels import choose
from astraea_jax.kv_cache.arrays import page_bytes
from astraea_jax.kv_cache.offload import LARGEST_BLOCK, block_sharding
from astraea_jax.lab import gpu_code
from astraea_jax.models.formats import EIGHT_BITS, FORMATS, Format
from astraea_jax.models.matrix import Forms, everywhere, plain
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.sharding import abstract_decoder, mesh_of

TEMP_BYTES = 512 * 2**20
"""Scratch memory that an executable may use per device: activations and logits of a step, a block of a transfer."""
LARGE = 2**20
"""Least elements of a weight that counts; smaller ones may be copied."""
MAX_CONTEXT = 16_384
"""Tokens of the longest context, which give the width of the page table."""
EXECUTABLES = ("decode-least", "decode-most", "mixed-most", "offload", "restore")
"""The decode steps with the fewest and most tokens, the largest mixed step, and transfers of the largest block."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
RESULT = r"= \(?(\w+)\[([\d,]+)\](\S*) .*?\b([a-z][a-z-]*)\("
"""Matches an HLO instruction: dtype, shape and layout of its (first) result, and its opcode."""
COPIES = ("copy", "copy-start", "transpose")
IN_PLACE = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "copy-done")
"""Opcodes that make no array; an asynchronous copy counts where it starts."""


@dataclass(frozen=True)
class Target:
    """Devices of one kind."""

    topology: str
    """Name of a TPU topology in libtpu, or of a GPU's description in the folder ``targets``."""
    memory: int
    """Bytes per device that JAX can use."""
    capability: int | None = None
    """Compute capability of a GPU; None for a TPU."""

    def devices(self) -> list[Any]:
        """Device descriptions, which can only be compiled for."""
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
"""A tpu7x chip of 192 GiB is two devices; by default JAX takes three quarters of a GPU's memory."""


def _fp8_block(path: str) -> Format:
    """Of the checkpoints of Qwen and others, where gate and up projection alternate in blocks of 64 outputs."""
    return Format("fp8", inputs=128, outputs=64 if path.endswith("gate_up") else 128)


def _mxfp4(path: str) -> Format | None:
    """Of gpt-oss's experts only."""
    return Format("fp4", inputs=32, scales="bfloat16") if ".mlp." in path else None


FORMS: dict[str, Forms] = {
    **{name: everywhere(form) for name, form in FORMATS.items()},
    "fp8-block": _fp8_block,
    "mxfp4": _mxfp4,
}
"""Name -> forms of a model's matrices: those that ``--quantize`` makes of them, and those of checkpoints."""


@dataclass(frozen=True)
class Case:
    """A model on a mesh of absent devices."""

    target: str
    model: str
    tp: int
    attention: str | None = None
    """Attention backend. None: the engine's choice."""
    scan: bool | None = None
    """Whether the layers run as one loop. None: the engine's choice."""
    quantize: str | None = None
    """Form of its matrices, of :data:`FORMS`."""
    kv_dtype: str | None = None
    """See :class:`~astraea_jax.engine.config.EngineConfig`."""


@dataclass
class Figures:
    """Figures of one executable, per device."""

    case: Case
    program: str
    """Name of the executable, of :data:`EXECUTABLES`."""
    arguments: int = 0
    """Bytes of the arguments."""
    aliased: int = 0
    """Bytes of the arguments whose memory the results reuse."""
    temp: int = 0
    """Bytes of scratch memory."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Number of collectives by kind; those of a loop count once."""
    seconds: float = 0.0
    """Time to trace, lower and compile."""
    launches: int | None = None
    """Launches of a step on a GPU whose layers are unrolled."""
    registers: dict[str, int] = field(default_factory=dict)
    """Registers per thread of those kernels for GPUs that were compiled for this executable first."""
    failures: list[str] = field(default_factory=list)
    """Checks that it does not pass."""


@dataclass(frozen=True)
class _Executable:
    """Something to compile, and its expected properties."""

    name: str
    lower: Callable[[], Any]
    aliased: int
    """Bytes of pages that it must write in place."""
    pages: set[int]
    """Sizes, in elements, of paged arrays, which it must not copy."""
    weights: set[int]
    """Sizes, in elements, of weights, which it must not make anew."""
    shared_layers: int
    """Layers in its HLO that devices compute together; 0: each device works alone."""
    unrolled_layers: int = 0
    """Layers of a step, unless they are one loop."""


class Unfit(Exception):
    """Raised when a model's weights leave no room for pages on these devices."""


def compile_case(
    case: Case, programs: Collection[str] = EXECUTABLES, on_program: Callable[[str], None] = lambda name: None
) -> Iterator[Figures]:
    """Compile executables one after the other; a compiler's error becomes a failure in their figures.

    Args:
        case: model and devices.
        programs: names of executables, of :data:`EXECUTABLES`.
        on_program: called with the name of each executable before it is compiled.

    Raises:
        Unfit: the weights leave no room; the message gives the numbers.
        StartupError: the attention backend is not available on these devices.
    """
    target = TARGETS[case.target]
    mesh = mesh_of(target.devices()[: case.tp])
    step = serving_step(case, mesh)
    case = replace(case, attention=step.backend.name, scan=step.stacked)
    with jax.default_device(mesh.devices.flat[0]):  # kernels look at its kind
        for program in _executables(step, case.tp):
            if program.name in programs:
                on_program(program.name)
                yield _compile(case, program)


def serving_step(case: Case, mesh: Mesh) -> Step:
    """The step with the engine's default sizes, and as many pages as fit beside the weights.

    Raises:
        Unfit: the pages hold less than one context of MAX_CONTEXT tokens.
        StartupError: the attention backend is not available on these devices.
    """
    model, dtype, target = PUBLISHED[case.model], jnp.dtype(jnp.bfloat16), TARGETS[case.target]
    platform = "tpu" if target.capability is None else "gpu"
    config = EngineConfig(**asdict(default_sizes(platform)))
    scan = target.capability is None if case.scan is None else case.scan
    kv_dtype = EIGHT_BITS[case.kv_dtype] if case.kv_dtype else dtype
    decoder = abstract_decoder(model, dtype, mesh, forms=FORMS[case.quantize] if case.quantize else plain, stacked=scan)
    backend = choose(
        case.attention,
        platform,
        kv_heads=model.num_kv_heads // case.tp,
        head_dim=model.head_dim,
        page_size=config.page_size,
        dtype=kv_dtype,
        sinks=model.sinks,
        compute_capability=target.capability,
    )
    weights = sum(map(_shard_bytes, jax.tree.leaves(nnx.state(decoder))))
    page = page_bytes(model, backend, config.page_size, kv_dtype, case.tp) // case.tp
    budget = int(DEVICE_KV_SHARE * (target.memory - weights))
    if budget // page * config.page_size < MAX_CONTEXT:
        raise Unfit(
            f"{weights / 1e9:.1f} GB of weights leave too little of {target.memory / 1e9:.1f} GB for the pages of "
            f"{MAX_CONTEXT} tokens"
        )
    width = MAX_CONTEXT // config.page_size
    pages = PageCounts.within(budget, page, model, replace(config, max_context=MAX_CONTEXT))
    window_pages = pages.window.num_pages if pages.window else 0
    sizes = StepSizes(
        pages.full, config.page_size, config.max_seqs, config.max_step_tokens, width, kv_dtype, window_pages
    )
    return Step(decoder, backend, sizes, mesh)


def _executables(step: Step, tp: int) -> Iterator[_Executable]:
    pages, in_text = step.pages, step.period if step.stacked else step.num_layers
    pool, layers_of = sum(map(_shard_bytes, pages)), step.groups.of.count if step.stacked else lambda group: 1
    paged = {_shard_elements(array) // layers_of(group) for array, group in zip(pages, step.groups.arrays, strict=True)}
    paged |= {_shard_elements(array) for array in pages}
    weights = {_shard_elements(leaf) for leaf in step.leaves if len(leaf.shape) > 1}
    if step.stacked:  # the layers' matrices have three axes
        turns = step.num_layers // step.period
        weights |= {_shard_elements(leaf) // turns for leaf in step.leaves if len(leaf.shape) > 2}
    weights = {elements for elements in weights if elements >= LARGE}
    decode, unrolled = [shape for shape in step.shapes if shape.q_tile == 1], 0 if step.stacked else step.num_layers
    for name, shape in zip(EXECUTABLES, (decode[0], decode[-1], step.shapes[-1])):
        lower = lambda shape=shape: step.jitted(shape).lower(*step.arguments(shape))  # noqa: E731
        alike = {shape.tokens * size for leaf in step.leaves for size in leaf.shape}  # activations as large as a weight
        yield _Executable(name, lower, pool, paged, weights - alike, in_text if tp > 1 else 0, unrolled)
    ids = jax.ShapeDtypeStruct((LARGEST_BLOCK,), jnp.int32, sharding=step.replicated)
    for group in step.groups.present:
        (gather, _, scatter), pages = step.transfers(group), step.pages_of(group)
        pool = sum(map(_shard_bytes, pages))
        whole = (LARGEST_BLOCK, step.groups.of.count(group), *pages[0].shape[1:])
        block = jax.ShapeDtypeStruct(whole, pages[0].dtype, sharding=block_sharding(pages[0]))
        offload = partial(gather.lower, pages, ids)
        restore = partial(scatter.lower, pages, block, ids)
        yield _Executable("offload", offload, 0, paged, set(), 0, unrolled)
        yield _Executable("restore", restore, pool, paged, set(), 0, unrolled)


def _compile(case: Case, program: _Executable) -> Figures:
    figures = Figures(case, program.name)
    began = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except Exception as error:  # the error of the compiler or kernel is the finding
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
    if (capability := TARGETS[case.target].capability) is not None:
        _look_at_gpu_code(figures, text, program.unrolled_layers, capability)
    return figures


def _look_at_gpu_code(figures: Figures, text: str, layers: int, capability: int) -> None:
    kind = figures.program.partition("-")[0]
    if layers:
        mixed = PUBLISHED[figures.case.model].experts is not None
        figures.launches, most = gpu_code.launches(text), gpu_code.most_launches(kind, layers, mixed)
        if figures.launches > most and figures.case.tp == 1 and (mixed or not figures.case.quantize):
            figures.failures.append(f"launches {figures.launches} kernels, {most} at most")
        figures.failures += [f"is no single command buffer: has a {opcode}" for opcode in gpu_code.branches(text)]
    for kernel in gpu_code.assembled(Path(os.environ["JAX_TRITON_DUMP_DIR"]), capability):
        figures.registers[kernel.name] = max(kernel.registers, figures.registers.get(kernel.name, 0))
        if kernel.spilled:
            figures.failures.append(f"{kernel.name} spills {kernel.spilled} bytes of registers")


def _shard_elements(array: jax.ShapeDtypeStruct) -> int:
    """Elements on each device."""
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape))


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    """Bytes on each device."""
    return _shard_elements(array) * int(array.dtype.itemsize)


def collectives(program: str) -> Counter[str]:
    """Count the collectives of an optimised HLO text, by kind."""
    return Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", program))


def wrong_collectives(found: Counter[str], layers: int) -> list[str]:
    """Describe collectives that differ from those that sharding the model needs.

    Needed are two sums per layer, after attention and after the feed-forward; one sum of the embeddings, since each
    device has the vectors of its share of V; one all-to-all of logits, from shares of V to shares of the rows; and a
    sum or gather of the sampled tokens. A single device needs none.

    Args:
        found: result of :func:`collectives`.
        layers: layers that devices compute together; 0: each device works alone.
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
    """List copies of pages, and new arrays of the size of weights, in an optimised HLO text.

    Results in the chip's fast memory (``S(1)`` in their layout) are prefetches and do not count.

    Args:
        program: the HLO text.
        pages: sizes of paged arrays, in elements.
        weights: sizes of weights, and of one layer's if they are stacked, in elements.
    """
    found = []
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.-]+)", program))  # inside a fusion a copy is a read order
    for name, computation in re.findall(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*{\n(.*?)^}", program, re.M | re.S):
        if name in fused:
            continue
        for dtype, shape, layout, kind in re.findall(RESULT, computation, re.M):
            size = math.prod(map(int, shape.split(",")))
            made = size in weights and kind not in IN_PLACE and dtype != "f32"  # sums may have this size
            if "S(1)" not in layout and (made or (size in pages and kind in COPIES)):
                found.append(f"{dtype}[{shape}] by {kind}")
    return found
