"""The Triton backend: choosing it; compiling it for GPUs that are not there; with `-m gpu`, running it on a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.experts import FORMATS, Choices, choices, matrix
from support.greedy_tokens import generate, greedy_tokens
from support.ragged import VARIANTS, Ragged, like_a_model, ragged

from astraea_jax.engine.config import EngineConfig
from astraea_jax.errors import StartupError
from astraea_jax.kernels import Reference, Triton
from astraea_jax.kernels.gpu import HEAD_DIMS, MOST_SPLITS, load_kernels, split_context
from astraea_jax.kernels.grouped import dispatch
from astraea_jax.kernels.grouped_triton import GroupedTriton
from astraea_jax.lab.gpu_code import assembled
from astraea_jax.models.heads import Switches
from astraea_jax.models.published import PUBLISHED

HAS = {name: importlib.util.find_spec(name) is not None for name in ("jax_triton", "jax_cuda13_plugin")}
AHEAD = Path(__file__).parents[1] / "support" / "ahead.py"

on_a_gpu = pytest.mark.gpu
needs_no_gpu = pytest.mark.skipif(
    not all(HAS.values()), reason="compiling for a GPU needs the [cuda] extra, on Python 3.12 or newer"
)


def test_a_machine_without_a_gpu_is_told_so():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(StartupError, match="NVIDIA GPUs, but JAX runs on"):
        EngineConfig(attention="triton").backend(PUBLISHED["qwen3-4b"])


@pytest.mark.skipif(HAS["jax_triton"], reason="jax-triton is installed")
def test_without_triton_the_way_out_is_named():
    with pytest.raises(StartupError, match=r"astraea-jax\[cuda\].*'reference'"):
        load_kernels()


@given(
    rows=st.integers(1, 512), heads=st.integers(1, 32), context=st.integers(1, 2**20), block=st.sampled_from([32, 64])
)
def test_splits_are_bounded_and_worth_while(rows, heads, context, block):
    splits, least = split_context(rows, heads, context, block)
    assert 1 <= splits <= MOST_SPLITS
    assert least >= 1
    assert (splits - 1) * least * block < context, "the last one would never have work"


@pytest.mark.serves("triton", "compiled", "prefill and decode in one step", "fp8 KV")
@needs_no_gpu
@pytest.mark.parametrize("target", ["a100", "h200", "b200"])
@pytest.mark.parametrize("kind", ["decode", "mixed", "float8"])
def test_compiled_for_gpus_that_are_not_here_pools_are_written_in_place(target, kind):
    """Kernels become machine code for it, the pool is the output's memory, and nothing of its size is copied."""
    compiled = {**os.environ, "TRITON_INTERPRET": "0"}  # tests in this process may have chosen the interpreter
    done = subprocess.run(
        [sys.executable, AHEAD, target, kind], env=compiled, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kernels"] == (4 if kind == "mixed" else 2)
    assert report["spilled"] == 0
    assert report["aliased"] >= report["pool"]
    assert report["temporary"] < report["pool"] / 4
    assert not re.search(rf"= \S*\[{report['pages']},2,\S* (copy|copy-start|fusion|scatter)\(", report["hlo"])


@pytest.mark.serves("triton", "compiled", "tensor parallelism", "int8 and fp8 weights", "KV to the host and back")
@needs_no_gpu
def test_the_step_on_four_gpus_and_the_transfers_pass_their_gates(tmp_path):
    """The script compiles all layers of Llama-3.1-8B in eight bits, which tests/ahead asks of TPUs."""
    script, figures = AHEAD.parents[2] / "scripts" / "compile_ahead.py", tmp_path / "figures.json"
    case = ("--target=h200", "--model=llama-3.1-8b", "--tp=4", "--quantize=int8", "--kv_dtype=fp8")
    programs = ("--program=decode-least,offload,restore", f"--json={figures}")
    compiled = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script, *case, *programs], env=compiled, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    step, offload, restore = json.loads(figures.read_text())["programs"]
    assert step["case"]["attention"] == "triton"
    assert step["case"]["scan"] is False
    assert step["temp"] < 2**26 < restore["aliased"] <= step["aliased"]
    assert offload["collectives"] == restore["collectives"] == {}


@needs_no_gpu
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("spills", [True, False])
def test_what_a_kernel_spills_is_seen(capability, spills, tmp_path):
    """A kernel that keeps 64 numbers at once, with and without a bound on its registers."""
    numbers = range(64)
    body = [f"ld.volatile.global.u32 %r{i}, [%a+{4 * i}];" for i in numbers]
    body += [f"st.volatile.global.u32 [%a+{4 * i}], %r{63 - i};" for i in numbers]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "some.ptx").write_text(
        f".version 8.7\n.target sm_{capability}\n.address_size 64\n"
        f".visible .entry some(.param .u64 at) {'.maxnreg 24' if spills else ''} {{\n"
        ".reg .u32 %r<64>; .reg .u64 %a;\nld.param.u64 %a, [at];\n" + "\n".join(body) + "\nret;\n}\n"
    )
    (kernel,) = assembled(tmp_path, capability)
    assert kernel.name == "some"
    assert (kernel.spilled > 0) is spills
    assert kernel.registers <= 24 if spills else kernel.registers > 60
    assert list(assembled(tmp_path, capability)) == []


@needs_no_gpu
def test_launches_may_be_recorded_into_command_buffers():
    """XLA's FFI metadata say so of jaxlib's handler (bit 0 of the traits)."""
    done = subprocess.run([sys.executable, AHEAD, "traits"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[-1:] == ["1"], done.stderr[-2000:]


@pytest.fixture(scope="module")
def triton():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU that JAX sees")
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32, in threads that compile, too
    yield Triton
    jax.config.update("jax_default_matmul_precision", None)


@pytest.mark.serves(
    "triton", "run", "prefill and decode in one step", "grouped queries, any ratio", "windows", "score caps"
)
@on_a_gpu
@settings(deadline=None, max_examples=20)  # each compiles its kernels
@given(case=ragged(long=700), variant=VARIANTS)
def test_matches_numpy(triton, case, variant):
    case = case.switched(*variant)
    case.check(case.attend(triton()), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.serves("triton", "run", "bfloat16", "heads of 64, 128, 256", "pages of 16 to 128 tokens")
@on_a_gpu
@pytest.mark.parametrize("head", HEAD_DIMS)
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_matches_numpy_in_half_precision(triton, dtype, size, head):
    case = Ragged.make(size, 4, 4, head, [1, 130, 0, 1, 17], [3000, 65, 0, size - 1, 0], seed=head)
    case.check(
        case.attend(triton(), dtype), case.expected(), rtol=2e-2, atol=2e-2
    )  # outputs of up to 4, of 8 bits each


@on_a_gpu
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 32])
def test_query_heads_that_share_a_head(triton, group):
    case = Ragged.make(16, 2, group, 64, [1, 50, 1], [500, 100, 0], seed=group)
    case.check(
        case.attend(triton(), jnp.bfloat16), case.expected(), rtol=2e-2, atol=2e-2
    )  # outputs of up to 4, of 8 bits each


@on_a_gpu
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("normed", "kv_heads", "group", "head"), [(False, 8, 4, 128), (True, 8, 4, 128), (True, 2, 7, 64)]
)
@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_queries_and_keys_are_rounded_as_by_the_other_backends(triton, decode, normed, kv_heads, group, head, kv_dtype):
    case = like_a_model(decode, normed, 16, kv_heads, group, head, seed=head + group)
    case.check_alike(triton(), Reference(), jnp.bfloat16, kv_dtype)


@on_a_gpu
@pytest.mark.parametrize(
    ("rows", "past"), [(1, 0), (1, 6000), (8, 31), (8, 32), (8, 33), (8, 3000), (64, 1), (64, 130)]
)
def test_decode_steps(triton, rows, past):
    """Contexts that end at edges of blocks, of which the new token is attended to before it is in memory."""
    case = Ragged.make(32, 4, 4, 128, [1] * rows, [past] * rows, seed=past, longest=past + 100, rotated=True)
    case.check(case.attend(triton()), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.serves("triton", "run", "fp8 KV")
@on_a_gpu
def test_float8_pages(triton):
    case = Ragged.make(32, 4, 4, 128, [1, 40, 1], [700, 30, 5], seed=8)
    out, _ = case.attend(triton(), jnp.bfloat16, jnp.float8_e4m3fn)
    real = case.batch.cu_q_lens[-1]
    np.testing.assert_allclose(out[:real], case.expected()[0][:real], atol=0.15)


@on_a_gpu
@settings(deadline=None, max_examples=20)
@given(case=choices())
def test_every_row_is_the_product_with_its_expert(triton, case):
    case.check_product(GroupedTriton(triton()), jnp.float32, 1e-4)


@on_a_gpu
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_products_of_experts_in_half_precision(triton, dtype, form, tokens):
    index = np.random.default_rng(tokens).permuted(np.tile(np.arange(8), (tokens, 1)), axis=1)[:, :2]
    case = Choices(index.astype(np.int32), 8, 256, 384, form, tokens)
    case.check_product(GroupedTriton(triton()), dtype, 2e-2)


@on_a_gpu
@pytest.mark.parametrize("form", FORMATS)
def test_a_token_of_few_and_one_of_many_have_the_same_result(triton, form):
    """Bit for bit, though their blocks are of other sizes."""
    grouped, made = GroupedTriton(triton()), matrix((4, 256, 256), FORMATS[form], jnp.bfloat16, seed=1)
    x = jax.random.normal(jax.random.key(1), (600, 256), jnp.bfloat16)
    results = []
    for tokens in (1, 40, 600):
        sent = dispatch(jnp.zeros((tokens, 1), jnp.int32), 4, grouped.block_rows(tokens, 4))
        results.append(grouped.product(x[:tokens][sent.tokens], made, sent.blocks)[sent.rows[0, 0]])
    assert all((result == results[0]).all() for result in results)


@on_a_gpu
@pytest.mark.parametrize("norms", ["bfloat16", "float32"])
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(("window", "head"), [(128, 64), (1024, 256), (None, 64)])
def test_windows_sinks_and_norms_in_float32(triton, window, head, decode, norms):
    """Pages that a window has left are the null page in the table, whose numbers are no numbers."""
    case = like_a_model(decode, True, 16, 2, 8, head, seed=head).switched(Switches(window=window), sinks=True)
    case = dataclasses.replace(case, float32_norms=norms == "float32").behind(window)
    case.check(case.attend(triton(), jnp.bfloat16), case.expected(), rtol=3e-2, atol=3e-2)


@pytest.mark.serves("triton", "run", "the engine's tokens, against dense attention")
@on_a_gpu
async def test_the_engine_generates_what_dense_attention_does(triton, make_engine, greedy):
    """The default backend of a GPU, with prefill in chunks and decode in one batch."""
    assert isinstance(EngineConfig().backend(PUBLISHED["qwen3-4b"]), triton)
    engine = make_engine(EngineConfig(max_seqs=8, max_step_tokens=24, page_size=8, kv_bytes=2**22, dtype="float32"))
    prompts = [[(7 * i + j) % 256 for j in range(3 + 11 * i)] for i in range(12)]
    outputs = await generate(engine, prompts)
    assert outputs == [greedy(prompt, 24) for prompt in prompts]


@on_a_gpu
def test_backends_and_the_processor_generate_the_same_tokens(triton):
    """The bundled model in float32 writes the same tokens with either backend of the GPU, and on the processor."""
    tokens = greedy_tokens("triton")
    assert tokens == greedy_tokens("reference")
    script = Path(__file__).parents[1] / "support" / "greedy_tokens.py"
    on_cpu = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], env=on_cpu, capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1]) == tokens, done.stderr[-2000:]
