"""Compares attention backends with each other and with the roofline of this machine.

One line per shape of a step and backend: time of one layer, writing of keys and values included; its share of the
floor, which is the time to read the context once, or to compute the scores and sums at the rate of a matrix product,
both measured here; and the largest error against the reference in float32.

  python scripts/bench_attention.py                     Llama-3.1-8B's heads on a GPU; a few tiny shapes on a CPU
  python scripts/bench_attention.py --batches=64 --contexts=2048,8192 --chunks= --page_size=64
  python scripts/bench_attention.py --backends=triton,cudnn --kv_dtype=float8_e4m3fn
  python scripts/bench_attention.py --backends=triton,triton:16x128x4x3    (M x N x warps x stages)

Backends: `triton` and `reference` are what `scripts/serve.py --attention` takes. The others are here to compare with:
`gather` (XLA: copy the pages, then attend), `cudnn` (its paged attention, through JAX's private interface) and
`flashinfer` (XQA through jax-tvm-ffi, on pools of its own layout; needs flashinfer-python, jax-tvm-ffi and nvcc). They
decode only. A backend that fails says why in its line; the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console

from astraea_jax.engine.step import PREFILL_TILE
from astraea_jax.frontends.flags import run_main
from astraea_jax.kernels import BACKENDS, Backend, Batch, Triton
from astraea_jax.kernels.gpu import Blocks
from astraea_jax.kernels.reference import attention, write_kv
from astraea_jax.lab.record import Section, define_flags, publish
from astraea_jax.lab.roofline import Roofline, best_seconds
from astraea_jax.models.heads import Heads

FLAGS = flags.FLAGS
flags.DEFINE_list("backends", ["triton", "cudnn", "flashinfer", "gather", "reference"], "Backends to measure.")
flags.DEFINE_list("batches", None, "Rows that decode; by default 1,16,64,256 on a GPU.")
flags.DEFINE_list("contexts", None, "Tokens of each row's context; by default 1024,8192,32768 on a GPU.")
flags.DEFINE_list("chunks", None, "Tokens of a prefill step; by default 512,2048,8192 on a GPU.")
flags.DEFINE_integer("heads", 32, "Query heads.", lower_bound=1)
flags.DEFINE_integer("kv_heads", 8, "Key/value heads.", lower_bound=1)
flags.DEFINE_integer("head_dim", 128, "Size of a head.", lower_bound=16)
flags.DEFINE_integer("page_size", 16, "Tokens per page.", lower_bound=1)
flags.DEFINE_string("dtype", None, "Dtype of queries, keys and values; by default bfloat16, float32 on a CPU.")
flags.DEFINE_string("kv_dtype", None, "Dtype of pages; by default the same.")
flags.DEFINE_integer("layers", 8, "Pools that a step goes through, so that no cache holds them; fewer if large.", 1)
flags.DEFINE_integer("pool_bytes", 48 * 2**30, "Device memory for all pools; cases that need more are skipped.", 1)
flags.DEFINE_integer("repeats", 5, "Measurements of a few steps; the shortest counts.", lower_bound=1)
define_flags("bench_attention")

console = Console()
Pool = Any
"""``pages`` of one layer in the form of a backend."""
Attend = Callable[[jax.Array, jax.Array, jax.Array, Pool, Batch], tuple[jax.Array, Pool]]
CHECKED = 2
"""Rows whose outputs are compared, from either end: the first may be prefill."""


@dataclass(frozen=True)
class Case:
    """A shape of a step: new tokens of each row, and how many are before them."""

    kind: str
    name: str
    q_lens: tuple[int, ...]
    past: tuple[int, ...]

    @property
    def lens(self) -> np.ndarray:
        return np.add(self.q_lens, self.past)

    @property
    def q_tile(self) -> int:
        return 1 if self.kind == "decode" else PREFILL_TILE

    def pages(self, size: int) -> int:
        return int((-(-self.lens // size)).sum())

    def bytes(self, itemsize: int, kv_itemsize: int) -> float:
        """Least bytes to move: the contexts, and queries, outputs, keys and values of the new tokens."""
        new = sum(self.q_lens) * FLAGS.head_dim
        context = 2 * self.lens.sum() * FLAGS.kv_heads * FLAGS.head_dim * kv_itemsize
        return float(context + 2 * new * (FLAGS.heads + FLAGS.kv_heads) * itemsize)

    def flops(self) -> float:
        """Operations of two products of every query with the tokens that it may see."""
        seen = sum(n * past + n * (n + 1) / 2 for n, past in zip(self.q_lens, self.past, strict=True))
        return 4 * seen * FLAGS.heads * FLAGS.head_dim


@dataclass(frozen=True)
class Figure:
    kind: str
    case: str
    backend: str
    ms: float | None = None
    """Milliseconds per layer."""
    floor_ms: float | None = None
    error: float | None = None
    layers: int | None = None
    failed: str | None = None


def cases() -> list[Case]:
    gpu = jax.default_backend() != "cpu"

    def numbers(given: list[str] | None, default: list[int]) -> list[int]:
        return default if given is None else [int(n) for n in given if n]

    batches = numbers(FLAGS.batches, [1, 16, 64, 256] if gpu else [1, 4])
    contexts = numbers(FLAGS.contexts, [1024, 8192, 32768] if gpu else [64])
    chunks = numbers(FLAGS.chunks, [512, 2048, 8192] if gpu else [32])
    made = [Case("decode", f"{b} x {c}", (1,) * b, (c - 1,) * b) for b in batches for c in contexts]
    made += [Case("prefill", f"{n} after {past}", (n,), (past,)) for n in chunks for past in (0, max(contexts))]
    mixed = [(n, b, c) for n in chunks[:1] for b in batches[-2:] for c in contexts[:2]]
    return made + [Case("mixed", f"{n} + {b} x {c}", (n, *(1,) * b), (0, *(c - 1,) * b)) for n, b, c in mixed]


def gather_attend(q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, batch: Batch) -> tuple[jax.Array, Any]:
    """Attend as XLA alone would: copy the contexts, then dense attention with a mask."""
    pages = write_kv(pages, k, v, batch.slot_mapping)
    _, _, heads, size, h = pages.shape
    rows, width = batch.page_table.shape
    keys, values = jnp.moveaxis(pages[batch.page_table], 2, 0)  # [R, M, K, S, H]
    scores = jnp.einsum("RKGH,RMKSH->RKGMS", q.reshape(rows, heads, -1, h), keys, preferred_element_type=jnp.float32)
    seen = jnp.arange(width * size).reshape(width, size) < batch.kv_lens[:, None, None]
    scores = jnp.where(seen[:, None, None], scores * h**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=(-1, -2)).astype(q.dtype)
    return jnp.einsum("RKGMS,RMKSH->RKGH", weights, values).reshape(q.shape), pages


def cudnn_attend(q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, batch: Batch) -> tuple[jax.Array, Any]:
    """Keys are pages 2p and values pages 2p + 1 of one pool. JAX insists on a pool without a spare page: not here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    pages = write_kv(pages, k, v, batch.slot_mapping)
    pool = pages.reshape(-1, *pages.shape[2:])
    table = 2 * batch.page_table[:, None, :, None]
    ones = jnp.ones_like(batch.kv_lens)
    check, cudnn.check_layout = cudnn.check_layout, lambda *_: None
    try:
        out = cudnn.paged_attention(
            q[:, :, None], pool, pool, ones, batch.kv_lens, table, table + 1,
            scale=q.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING, qkv_layout="BNTH",
        )  # fmt: skip
    finally:
        cudnn.check_layout = check
    return out.reshape(q.shape), pages


def flashinfer_attend() -> Attend:
    """FlashInfer's XQA, on keys and values ``[P, S, K, H]`` apart."""
    import flashinfer.jit.xqa
    import jax_tvm_ffi
    import torch

    dtype, size, h = getattr(torch, FLAGS.dtype), FLAGS.page_size, FLAGS.head_dim
    group = FLAGS.heads // FLAGS.kv_heads
    module = flashinfer.jit.xqa.gen_xqa_module(dtype, dtype, size, h, group, False, dtype).build_and_load()
    cores = torch.cuda.get_device_properties(0).multi_processor_count

    def call(out: Any, q: Any, keys: Any, values: Any, table: Any, lens: Any, semaphores: Any, scratch: Any) -> None:
        module.xqa_wrapper(
            False, cores, FLAGS.kv_heads, 0, 1.0, None, out, 1.0, q, None, keys, values, None, None, table,
            table.shape[1] * size, lens, q.shape[0], 1.0, None, 1, None, None, semaphores, scratch, False,
        )  # fmt: skip

    jax_tvm_ffi.register_ffi_target(
        "xqa", call, arg_spec=["rets", "args"], platform="gpu", allow_cuda_graph=True, pass_owned_tensor=True
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, pool: Pool, batch: Batch) -> tuple[jax.Array, Pool]:
        at = batch.slot_mapping // size, batch.slot_mapping % size
        keys, values = (x.at[at].set(new.astype(x.dtype)) for x, new in zip(pool, (k, v), strict=True))
        out = jax.ffi.ffi_call("xqa", jax.ShapeDtypeStruct((q.shape[0], 1, *q.shape[1:]), q.dtype))(
            q[:, None], keys, values, batch.page_table, batch.kv_lens[:, None].astype(jnp.uint32),
            jnp.zeros(2 << 20, jnp.uint32), jnp.zeros(120 << 20, jnp.uint8),
        )  # fmt: skip
        return out[:, 0], (keys, values)

    return attend


def is_backend(name: str) -> bool:
    return name.partition(":")[0] in BACKENDS


def backend_of(name: str) -> Backend:
    """A backend of the engine; ``triton:MxNxWARPSxSTAGES`` has these blocks for rows of any length."""
    name, _, sizes = name.partition(":")
    if not sizes:
        return BACKENDS[name]()
    blocks = Blocks(*map(int, sizes.split("x")))
    return Triton(single=blocks, tiles=blocks)


def attend_of(name: str, case: Case) -> Attend:
    """The ``attend`` function of a backend.

    Raises:
        ValueError: the backend does not do this kind of step, or is unknown.
    """
    if is_backend(name):
        backend = backend_of(name)
        return lambda q, k, v, pool, batch: backend.attend(Heads.of(q, k, v), pool, batch, q_tile=case.q_tile)
    if name not in ("gather", "cudnn", "flashinfer"):
        raise ValueError(f"unknown; choose from {', '.join([*BACKENDS, 'gather', 'cudnn', 'flashinfer'])}")
    if case.kind != "decode":
        raise ValueError("decodes only")
    return flashinfer_attend() if name == "flashinfer" else {"gather": gather_attend, "cudnn": cudnn_attend}[name]


def bits_of(name: str) -> Any:
    """Dtype of the array in which a backend's pages lie."""
    return backend_of(name).page_dtype(np.dtype(FLAGS.kv_dtype))


def make_pool(name: str, case: Case, seed: int) -> Pool:
    """Random pages of one layer, page 0 the null page, in the form of a backend."""
    shape = (case.pages(FLAGS.page_size) + 1, 2, FLAGS.kv_heads, FLAGS.page_size, FLAGS.head_dim)

    @jax.jit
    def make(key: jax.Array) -> Pool:
        some = jax.random.normal(key, (min(shape[0], 1024), *shape[1:])).astype(FLAGS.kv_dtype)
        pages = jnp.tile(some, (-(-shape[0] // len(some)), 1, 1, 1, 1))[: shape[0]]
        if name == "flashinfer":
            return tuple(jnp.moveaxis(pages, (1, 2), (0, 3)))
        if name in ("tokamax", "jax-rpa"):  # per token and head: the key, then the value
            of_token = pages.transpose(0, 3, 2, 1, 4)
            sizes = FLAGS.kv_heads, FLAGS.page_size, FLAGS.head_dim, np.dtype(FLAGS.kv_dtype)
            return of_token.reshape(len(pages), *backend_of(name).page_shape(*sizes))
        return pages.view(bits_of(name)) if is_backend(name) else pages

    return jax.block_until_ready(make(jax.random.key(seed)))


def make_batch(case: Case, seed: int) -> Batch:
    """Lay the contexts of a case into pages in random order."""
    size, lens = FLAGS.page_size, case.lens
    used = -(-lens // size)
    ids = iter(np.random.default_rng(seed).permutation(np.arange(1, used.sum() + 1)))
    table = np.zeros((len(lens), used.max()), np.int32)
    slot_mapping = []
    for row, (count, past, end) in enumerate(zip(used, case.past, lens, strict=True)):
        table[row, :count] = [next(ids) for _ in range(count)]
        pos = np.arange(past, end)
        slot_mapping.append(table[row, pos // size] * size + pos % size)
    cu = np.concatenate([[0], np.cumsum(case.q_lens)])
    return Batch(*(jnp.asarray(x, jnp.int32) for x in (table, lens, cu, np.concatenate(slot_mapping))))


def make_tokens(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    heads = FLAGS.heads, FLAGS.kv_heads, FLAGS.kv_heads
    shapes = [(sum(case.q_lens), n, FLAGS.head_dim) for n in heads]
    q, k, v = (jax.random.normal(key, s).astype(FLAGS.dtype) for key, s in zip(keys, shapes, strict=True))
    return q, k, v


def expected(case: Case, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Token indices of a few rows, and their outputs by the reference in float32."""
    q, k, v = make_tokens(case)
    rows = sorted({*range(len(case.lens))[:CHECKED], *range(len(case.lens))[-CHECKED:]})
    cu = np.asarray(batch.cu_q_lens)
    tokens = np.concatenate([np.arange(cu[r], cu[r + 1]) for r in rows])
    ends = jnp.asarray(np.concatenate([[0], np.cumsum([case.q_lens[r] for r in rows])]), jnp.int32)
    pages = jax.jit(write_kv, donate_argnums=0)(make_pool("reference", case, 0), k, v, batch.slot_mapping)
    some = jnp.asarray(rows)
    run = jax.jit(partial(attention, scale=FLAGS.head_dim**-0.5), static_argnames="q_tile")
    out = run(
        q[tokens].astype(jnp.float32), pages, batch.page_table[some], batch.kv_lens[some], ends, q_tile=case.q_tile
    )
    return tokens, np.asarray(out)


def measure(name: str, case: Case, batch: Batch, truth: tuple[np.ndarray, np.ndarray], floor: float) -> Figure:
    """One backend on one shape, in a step of a few layers that donates their pools."""
    attend = attend_of(name, case)
    q, k, v = make_tokens(case)
    one = make_pool(name, case, 0)
    size = sum(x.nbytes for x in jax.tree.leaves(one))
    layers = max(1, min(FLAGS.layers, FLAGS.pool_bytes // size))
    pools = [one, *(make_pool(name, case, seed) for seed in range(1, layers))]

    @partial(jax.jit, donate_argnums=0)
    def step(pools: list[Pool], q: jax.Array) -> tuple[list[Pool], jax.Array, jax.Array]:
        outputs, after = [], []
        for pool in pools:  # one layer's output is the next one's queries, so that they run one after the other
            q, pool = attend(q, k, v, pool, batch)
            outputs.append(q)
            after.append(pool)
        return after, q, outputs[0]

    pools, _, out = step(pools, q)
    tokens, exact = truth
    error = float(np.abs(np.asarray(out)[tokens].astype(np.float32) - exact).max())

    def again() -> jax.Array:
        nonlocal pools
        pools, last, _ = step(pools, q)
        return last

    ms = 1e3 * best_seconds(again, FLAGS.repeats) / layers
    return Figure(case.kind, case.name, name, ms, 1e3 * floor, error, layers)


def table(figures: Sequence[Figure]) -> Section:
    rows = []
    for f in figures:
        if f.ms is None or f.floor_ms is None:
            rows.append((f.kind, f.case, f.backend, *["-"] * 4))  # why: said when it was tried
        else:
            share = f"{f.floor_ms / f.ms:.0%}"
            rows.append((f.kind, f.case, f.backend, f"{f.ms:.4f}", share, f"{f.error:.1e}", str(f.layers)))
    title = f"Attention of one layer, {FLAGS.dtype}, pages of {FLAGS.page_size} tokens in {FLAGS.kv_dtype}"
    return Section(title, ("step", "shape", "backend", "ms", "of the floor", "error", "pools"), rows, named=3)


def main(_: list[str]) -> None:
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype: str = FLAGS.dtype or default
    kv_dtype: str = FLAGS.kv_dtype or dtype
    FLAGS["dtype"].value, FLAGS["kv_dtype"].value = dtype, kv_dtype
    itemsize, kv_itemsize = jnp.dtype(dtype).itemsize, jnp.dtype(kv_dtype).itemsize
    roofline = Roofline.measure(FLAGS.dtype)
    figures: list[Figure] = []
    for case in cases():
        page = 2 * FLAGS.page_size * FLAGS.kv_heads * FLAGS.head_dim * kv_itemsize
        if case.pages(FLAGS.page_size) * page > FLAGS.pool_bytes:
            console.print(f"[dim]{case.kind} {case.name}: skipped, one pool exceeds --pool_bytes[/]")
            continue
        batch = make_batch(case, 0)
        truth = expected(case, batch)
        floor = max(roofline.read_s(case.bytes(itemsize, kv_itemsize)), roofline.matmul_s(case.flops()))
        for name in FLAGS.backends:
            try:
                figures.append(measure(name, case, batch, truth, floor))
            except Exception as error:  # whatever a backend raises, the others go on
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                figures.append(Figure(case.kind, case.name, name, failed=reason))
            console.print(f"[dim]{case.kind} {case.name} {name}: {figures[-1].failed or f'{figures[-1].ms:.4f} ms'}[/]")
    sizes = {name: getattr(FLAGS, name) for name in ("heads", "kv_heads", "head_dim", "page_size", "dtype", "kv_dtype")}
    publish("bench_attention", [table(figures)], {**sizes, "rows": [asdict(f) for f in figures]}, roofline)


def run() -> None:
    """Run the benchmark."""
    run_main(main, __name__)
