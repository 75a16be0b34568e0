"""The Triton kernels against NumPy, run by Triton's interpreter: `make parity`, since that needs PyTorch."""

from __future__ import annotations

import dataclasses
import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from support.ragged import VARIANTS, Ragged, like_a_model, ragged

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.kernels import BACKENDS, Reference
from astraea_jax.kernels.backend import stored
from astraea_jax.models.heads import Switches

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def interpreted():
    """Imported late: collecting tests must work without Triton and PyTorch."""
    from support.interpreted import Interpreted

    return Interpreted


@pytest.mark.serves(
    "triton", "interpreted", "prefill and decode in one step", "grouped queries, any ratio", "windows", "score caps"
)
@settings(deadline=None, max_examples=12)
@given(case=ragged(long=200), variant=VARIANTS)
def test_matches_numpy(interpreted, case, variant):
    case = case.switched(*variant).behind(variant[0].window)
    case.check(case.attend(interpreted()), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.serves("triton", "interpreted", "heads of 64, 128, 256")
@pytest.mark.parametrize("head", [64, 128, 256])
def test_head_sizes_in_float16(interpreted, head):
    """The interpreter multiplies no bfloat16 matrices."""
    case = Ragged.make(16, 2, 4, head, [1, 33, 0, 2], [200, 31, 0, 15], seed=head)
    case.check(case.attend(interpreted(), jnp.float16), case.expected(), rtol=1e-2, atol=1e-2)


@pytest.mark.serves("triton", "interpreted", "pages of 16 to 128 tokens")
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_page_sizes(interpreted, size):
    case = Ragged.make(size, 1, 2, 16, [1, 20, 1], [size, size - 1, 2 * size - 1], seed=size)
    case.check(case.attend(interpreted()), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.serves("triton", "interpreted", "fp8 KV")
@pytest.mark.parametrize("capability", [80, 90])
def test_float8_pages(interpreted, capability):
    """Eight-bit pages are floats, or bits for GPUs that do not know them."""
    case = Ragged.make(16, 2, 2, 32, [1, 5, 1], [40, 3, 0], seed=1)
    fp8 = {name: getattr(case, name).astype(jnp.float8_e4m3fn).astype(np.float32) for name in ("k", "v", "pages")}
    got = case.attend(interpreted(compute_capability=capability), kv_dtype=jnp.float8_e4m3fn)
    rounded = dataclasses.replace(case, **fp8)
    rounded.check(got, rounded.expected(), rtol=1e-4, atol=1e-5)


def test_every_float8_number_has_its_bits_taken_apart_right(interpreted):
    """Attention to a context of one token is that token's value."""
    numbers = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    case = Ragged.make(16, 16, 1, 16, [1], [0], seed=2)
    case = dataclasses.replace(case, v=numbers.reshape(1, 16, 16))
    out, _ = case.attend(interpreted(compute_capability=80), jnp.float32, jnp.float8_e4m3fn)
    np.testing.assert_array_equal(out.reshape(-1), numbers)


@pytest.mark.parametrize("capability", [80, 90])
def test_float8_is_rounded_as_by_the_other_backends(interpreted, capability):
    """Ties, what lies beside them, what is too large, and what is no number."""
    numbers = np.arange(0x7F, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
    ties = (numbers[1:] + numbers[:-1]) / 2
    others = [449, 464, 465, 1e9, np.inf, np.nan]
    above_zero = np.concatenate([numbers, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf), others])
    several = np.resize(np.concatenate([above_zero, -above_zero]), (1, 8, 128)).astype(np.float32)
    case = Ragged.make(16, 8, 1, 128, [1], [0], seed=2)
    keys = np.nan_to_num(several, nan=0, posinf=500, neginf=-500)
    case = dataclasses.replace(case, k=keys, v=several[:, ::-1])
    _, pages = case.attend(interpreted(compute_capability=capability), jnp.float32, jnp.float8_e4m3fn)
    slot = case.batch.slot_mapping[0]
    expected = np.stack([keys[0], several[0, ::-1]])
    expected = np.asarray(stored(expected, jnp.float8_e4m3fn), np.float32)
    np.testing.assert_array_equal(pages[slot // 16, :, :, slot % 16], expected)


@pytest.mark.serves("triton", "interpreted", "norms of heads in float32")
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("norms", [None, "float16", "float32"])
def test_queries_and_keys_are_rounded_as_by_the_other_backends(interpreted, decode, norms):
    """A norm is rounded after its scale, and before it if the scale is not in float32; a rotation once."""
    case = like_a_model(decode, norms is not None, 16, 2, 4, 64, seed=3)
    case = dataclasses.replace(case, float32_norms=norms == "float32")
    case.check_alike(interpreted(), Reference(), jnp.float16)


@pytest.mark.serves("triton", "interpreted", "windows", "score caps", "sinks")
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("window", [1, 16, 100, 128, 400])
def test_windows_and_sinks_over_several_blocks_and_pages(interpreted, decode, window):
    """Pages that no query of a step sees are the null page in the table, whose numbers are no numbers."""
    case = like_a_model(decode, False, 16, 1, 8, 64, seed=window).switched(Switches(window=window), sinks=True)
    case = case.behind(window)
    case.check(case.attend(interpreted()), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.serves("triton", "interpreted", "the engine's tokens, against dense attention")
async def test_the_engine_generates_what_dense_attention_does(interpreted, make_engine, greedy, monkeypatch):
    monkeypatch.setitem(BACKENDS, "interpreted", interpreted)
    sizes = EngineConfig(max_seqs=2, max_step_tokens=24, page_size=8, kv_bytes=2**20, max_context=64, dtype="float32")
    engine = make_engine(dataclasses.replace(sizes, attention="interpreted"))
    prompts = [list(range(40, 71)), list(range(90, 95))]
    streams = [engine.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True)) for prompt in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        assert [token async for delta in stream for token in delta.token_ids] == greedy(prompt, 4)
