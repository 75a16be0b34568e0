"""gpt-oss as OpenAI publishes it, from its files to tokens: MXFP4 experts, windows, sinks and biases."""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.gpt_oss_files import QUANTIZED, write_gpt_oss
from support.wide import TIGHT, run_programs

from astraea_jax.engine.engine import Engine
from astraea_jax.models.checkpoint import copy_beside, load
from astraea_jax.models.config import CheckpointError
from astraea_jax.models.matrix import Matrix
from astraea_jax.models.quantization_config import narrowed
from astraea_jax.models.safetensors_files import open_tensors

PAGE = 2 * 1024
"""Bytes of a page of four tokens and its window page, two layers."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, random_folder):
    """A folder in MXFP4, and one with the same weights in float32."""
    narrow, again = (tmp_path_factory.mktemp(name) for name in ("mxfp4", "wide"))
    write_gpt_oss(narrow, again)
    for folder in (narrow, again):
        copy_beside(random_folder, folder)
    return narrow, again


def said(folder, *, alone, **options):
    engine = Engine.from_folder(folder, dataclasses.replace(TIGHT, **options))
    engine.start()
    try:
        return run_programs(engine, alone=alone), engine.stats()
    finally:
        engine.shutdown(grace_s=0)


@pytest.mark.serves("native", "tested", "MXFP4 weights")
@pytest.mark.serves("reference", "tested", "MXFP4 weights")
def test_the_published_form_says_what_its_weights_say(folders):
    """In a batch and chunks, preempted, and with KV that went to the host and came back; on one device and two,
    these with the other attention."""
    narrow, again = folders
    expected, _ = said(again, alone=True, kv_bytes=400 * PAGE)
    tight = {"kv_bytes": 32 * PAGE, "host_kv_bytes": 80 * PAGE, "residency": "always-offload"}
    found, stats = said(narrow, alone=False, **tight)
    assert found == expected
    assert min(stats.offloaded_pages, stats.restored_pages, stats.preemptions) > 0, "the pool was meant to be small"
    shared, _ = said(
        narrow, alone=False, **tight | {"tensor_parallel": 2, "kv_bytes": 16 * PAGE, "attention": "reference"}
    )
    assert shared == expected
    assert len({tuple(one) for one in expected}) > 5, "programs were meant to differ"


def test_experts_stay_as_narrow_as_in_the_file(folders):
    decoder = load(folders[0], jnp.float32)
    forms = {path[-1]: module.form for path, module in nnx.iter_modules(decoder) if isinstance(module, Matrix)}
    assert forms["qkv"] is forms["o"] is None
    for name in ("gate_up", "down"):
        assert (forms[name].codes, forms[name].inputs) == ("fp4", 32)


def test_blocks_without_their_scales_are_refused(folders):
    tensors = open_tensors(folders[0])
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    with pytest.raises(CheckpointError, match=r"lack .*down_proj_scales, which the quantized"):
        narrowed({"quantization_config": QUANTIZED}, tensors)


def test_scales_that_are_no_numbers_are_refused(folders):
    """255 is no power of two in the OCP formats, but NaN."""
    tensors = open_tensors(folders[0])
    name = "model.layers.1.mlp.experts.down_proj_scales"
    exponents = tensors[name].stored().copy()
    exponents[2, 5, 1] = 255
    tensors[name] = tensors[name]._replace(data=exponents.reshape(-1).view(np.uint8))
    weight = narrowed({"quantization_config": QUANTIZED}, tensors)[name.removesuffix("_scales")]
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} holds scales that are NaN"):
        weight.part("two", (2, slice(None), slice(None)), transposed=True).array()
