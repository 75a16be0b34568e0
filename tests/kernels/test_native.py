"""The kernels in C++ against a few lines of NumPy and the reference, over random ragged batches."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from support.ragged import VARIANTS, ragged

from astraea_jax.kernels import Native, Reference


@pytest.mark.serves(
    "native", "tested", "prefill and decode in one step", "grouped queries, any ratio", "windows", "score caps"
)
@settings(deadline=None, max_examples=60)
@given(case=ragged(), variant=VARIANTS)
def test_matches_numpy(case, variant):
    case = case.switched(*variant).behind(variant[0].window)
    case.check(case.attend(Native()), case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.serves("native", "tested", "bfloat16", "fp8 KV")
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@settings(deadline=None, max_examples=20)
@given(case=ragged(), variant=VARIANTS)
def test_narrow_pages_are_as_the_reference_writes_and_reads_them(kv_dtype, case, variant):
    case = case.switched(*variant).behind(variant[0].window)
    case.check_alike(Native(), Reference(), jnp.float32, jnp.dtype(kv_dtype))
