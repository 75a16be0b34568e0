"""Checkpoints in fewer bits are read as the weights that they stand for, and take no more memory than their files."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.damaged import damaged
from support.narrow_writers import WRITERS, words, write_narrow
from support.reading import change
from support.wide import WIDE, wide_decoder

from astraea_jax.models.checkpoint import load, random_decoder, save_hf, save_orbax
from astraea_jax.models.config import CheckpointError, ModelConfig
from astraea_jax.models.formats import FORMATS
from astraea_jax.models.matrix import Matrix, multiply
from astraea_jax.models.narrow import dequantized
from astraea_jax.models.narrow_files import NarrowTensor
from astraea_jax.models.quantization_config import narrowed
from astraea_jax.models.safetensors_files import open_tensors
from astraea_jax.models.sharding import mesh_of

FILE = "model.safetensors"
CONFIG = ModelConfig(64, 64, 96, 2, 4, 2, 32, 128, qkv_bias=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    save_hf(random_decoder(CONFIG, jnp.float32, seed=0), folder)
    return folder


def first_down(folder, mesh):
    """A matrix whose inputs are divided over devices."""
    decoder: Any = load(folder, jnp.float32, mesh)
    return decoder.layers[0].mlp.down


def matrices(decoder):
    """Every matrix by its path, in float32, and the forms that they have."""
    found, forms = {}, {}
    for path, node in nnx.iter_graph(decoder):
        if isinstance(node, Matrix):
            name = ".".join(map(str, path))
            found[name] = np.asarray(
                node.weight[...] if node.form is None else dequantized(node.codes, node.form, jnp.float32)
            )
            forms[name] = node.form
    return found, forms


def assert_reads(narrow, again):
    ours, forms = matrices(load(narrow, jnp.float32))
    theirs, _ = matrices(load(again, jnp.float32))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        np.testing.assert_allclose(ours[name], weight, rtol=1e-6, atol=1e-7, err_msg=name)
    return forms


@pytest.mark.serves("native", "tested", "fp8 weights", "int4 weights")
@pytest.mark.serves("reference", "tested", "fp8 weights", "int4 weights")
@pytest.mark.parametrize("name", WRITERS)
def test_weights_are_those_of_the_file(name, wide, tmp_path):
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", name)
    forms = assert_reads(tmp_path / "narrow", tmp_path / "again")
    kept = [path for path, form in forms.items() if form is not None]
    assert len(kept) == 4 * CONFIG.num_layers - ("-quantized" in name)


def test_parts_that_differ_are_dequantised(wide, tmp_path, caplog):
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", "awq", skip=("layers.1.self_attn.k_proj",))
    forms = assert_reads(tmp_path / "narrow", tmp_path / "again")
    assert forms["layers.1.attention.qkv"] is None
    assert forms["layers.0.attention.qkv"] is not None
    assert "layers.1.attention.qkv is dequantized while it is read: its parts differ in their form" in caplog.text


def test_parts_with_and_without_zeros_join(wide, tmp_path):
    """A matrix whose zeros all lie in the middle of the codes has none, beside others that have."""
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", "gptq")
    write_narrow(wide, tmp_path / "middle", tmp_path / "middle again", "gptq-symmetric-groups")
    for folder, other in ((tmp_path / "narrow", tmp_path / "middle"), (tmp_path / "again", tmp_path / "middle again")):
        taken = {name: x for name, x in load_file(other / FILE).items() if ".mlp.up_proj." in name}
        save_file(load_file(folder / FILE) | taken, folder / FILE, metadata={"format": "pt"})
    forms = assert_reads(tmp_path / "narrow", tmp_path / "again")
    assert forms["layers.0.mlp.gate_up"].zeros


@pytest.mark.parametrize("name", WRITERS)
def test_memory_of_weights_is_near_the_file(name, tmp_path):
    config = ModelConfig(64, 256, 512, 2, 4, 2, 64, 128)
    save_hf(random_decoder(config, jnp.float32, seed=0), tmp_path / "wide")
    write_narrow(tmp_path / "wide", tmp_path / "narrow", tmp_path / "again", name)
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(load(tmp_path / "narrow", jnp.float32))))
    assert size < 1.1 * (tmp_path / "narrow" / FILE).stat().st_size


def test_one_that_is_quantized_is_not_quantized_again(wide, tmp_path):
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", "awq")
    with pytest.raises(CheckpointError, match="is quantized already, to int4"):
        load(tmp_path / "narrow", jnp.float32, quantize=FORMATS["int8"])


@pytest.mark.parametrize("name", ["fp8-block", "float-quantized-channel", "awq", "pack-quantized-4-zeros"])
def test_orbax_keeps_forms(name, wide, tmp_path):
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", name, skip=("layers.1.self_attn.k_proj",))
    ours = load(tmp_path / "narrow", jnp.float32)
    save_orbax(ours, tmp_path / "orbax")
    kept = load(tmp_path / "orbax", jnp.float32)
    assert matrices(kept)[1] == matrices(ours)[1]
    for one, other in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(kept)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["fp8-block-small", "awq", "pack-quantized-8", "gptq-symmetric"])
def test_devices_get_their_parts(name, tmp_path):
    save_hf(wide_decoder(), tmp_path / "wide")
    write_narrow(tmp_path / "wide", tmp_path / "narrow", tmp_path / "again", name)
    mesh = mesh_of(jax.devices()[:4])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, WIDE.intermediate_size)), jnp.float32)
    ours, alone = (first_down(tmp_path / "narrow", where) for where in (mesh, None))
    assert ours.weight[...].sharding.shard_shape(ours.weight.shape)[0] == ours.weight.shape[0] // 4
    np.testing.assert_array_equal(ours.weight[...], alone.weight[...])
    np.testing.assert_allclose(jax.jit(multiply)(x, ours), multiply(x, alone), rtol=1e-5, atol=1e-5)


def with_weights(**fields):
    """A configuration of compressed-tensors with other fields of weights."""
    config = copy.deepcopy(WRITERS["pack-quantized-4"][0])
    config["config_groups"]["group_0"]["weights"] |= fields
    return config


CONFIGURATIONS = {
    "quant_method = 'bitsandbytes' is not served; fp8": {"quant_method": "bitsandbytes"},
    "version = 'gemv' is not served, only 'gemm'": WRITERS["awq"][0] | {"version": "gemv"},
    "bits = 3 is not served, only 4, 8": WRITERS["gptq"][0] | {"bits": 3},
    "checkpoint_format = 'marlin' is not served": WRITERS["gptq"][0] | {"checkpoint_format": "marlin"},
    "format = 'nvfp4-pack-quantized' is not served": WRITERS["int-quantized"][0] | {"format": "nvfp4-pack-quantized"},
    "kv_cache_scheme is not served": WRITERS["int-quantized"][0] | {"kv_cache_scheme": {"num_bits": 8}},
    "transform_config is not served": WRITERS["int-quantized"][0] | {"transform_config": {"config_groups": {}}},
    "fmt = 'e5m2' is not served": WRITERS["fp8-block"][0] | {"fmt": "e5m2"},
    "strategy = 'tensor_group' is not served": with_weights(strategy="tensor_group"),
    "num_bits = 6 is not served, only 4, 8": with_weights(num_bits=6),
    "dynamic = 'local' is not served": with_weights(dynamic="local"),
}


@pytest.mark.parametrize("message", CONFIGURATIONS)
def test_variants_that_are_not_served(message, wide, tmp_path):
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", "awq")
    change(tmp_path / "narrow" / "config.json", quantization_config=CONFIGURATIONS[message])
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path / "narrow", jnp.float32)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("awq", {"group_size": 128}, "bits = 4, group_size = 128, but .* hold 4 bits in groups of 32 of \\d+ inputs"),
        ("gptq", {"bits": 8}, "bits = 8, group_size = 32, but .* hold 4 bits in groups of 32"),
        ("gptq-8", {"bits": 4, "group_size": -1}, "bits = 4, group_size = -1, but .* hold 8 bits in groups of 32"),
        ("gptq", {"dynamic": {"-:.*": {}, "+:.*": {"group_size": 64}}, "group_size": 128}, "128 or .*group_size = 64"),
        ("gptq", {"group_size": 0}, "group_size is 0"),
        ("gptq", {"group_size": "32"}, "group_size is '32'"),
        ("pack-quantized-4", {"num_bits": 8}, "bits = 8, group_size = 32, but .* hold 4 bits"),
        ("pack-quantized-4", {"group_size": 16}, "bits = 4, group_size = 16, but .* in groups of 32"),
        ("pack-quantized-4-channel", {"group_size": 32, "strategy": "group"}, r"in groups of (\d+) of \1 inputs"),
        ("int-quantized", {"num_bits": 4}, "bits = 4, .* hold 8 bits"),
    ],
)
def test_configurations_that_contradict_the_tensors_are_refused(name, change, said, wide, tmp_path):
    """Both are named."""
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", name)
    config = copy.deepcopy(WRITERS[name][0])
    (config["config_groups"]["group_0"]["weights"] if "config_groups" in config else config).update(change)
    with pytest.raises(CheckpointError, match=said):
        narrowed({"quantization_config": config}, open_tensors(tmp_path / "narrow"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("awq", {"group_size": 32}),
        ("gptq", {"group_size": 128, "dynamic": {"+:.*": {"group_size": 32}}}),
        ("gptq-symmetric", {"group_size": -1}),
        ("gptq-symmetric", {"group_size": 128}),  # more than there are inputs
        ("pack-quantized-4-channel", {"group_size": -1}),
    ],
)
def test_configurations_that_agree_are_read(name, change, wide, tmp_path):
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", name)
    config = copy.deepcopy(WRITERS[name][0])
    (config["config_groups"]["group_0"]["weights"] if "config_groups" in config else config).update(change)
    weights = narrowed({"compression_config": config}, open_tensors(tmp_path / "narrow"))
    assert isinstance(weights["model.layers.0.mlp.down_proj.weight"], NarrowTensor)


def test_zeros_of_nothing_in_version_1(wide, tmp_path):
    """One is taken from whole words, as GPTQModel does it: a zero of 0 borrows from the next one."""
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", "gptq-v2")
    zeros = np.array([[0, 5, 0, 0, 15, 1, 2, 0] * 8], np.int64).repeat(2, 0)
    tensors = {n: t for n, t in open_tensors(tmp_path / "narrow").items() if n.startswith("model.layers.0.mlp.gate")}
    name = "model.layers.0.mlp.gate_proj"
    zeros = np.tile(zeros, 2)[:, : tensors[f"{name}.scales"].shape[1]]
    for version, less in (("gptq_v2", 0), ("gptq", 0x11111111), (None, 0x11111111)):
        stored = words(zeros, 4) - np.int32(less)
        own = tensors[f"{name}.qzeros"]._replace(data=stored.view(np.uint8).reshape(-1))
        fields = WRITERS["gptq"][0] | {"checkpoint_format": version}
        weight = narrowed({"quantization_config": fields}, {**tensors, own.name: own})[f"{name}.weight"]
        np.testing.assert_array_equal(weight.numbers().zeros, zeros.T)


@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_zeros_are_in_the_middle_whatever_version_a_file_says(version, wide, tmp_path):
    """GPTQModel 5 writes those of version 2 and says version 1."""
    narrow = tmp_path / "narrow"
    write_narrow(wide, narrow, tmp_path / "again", "gptq-symmetric-groups")
    if version == 2:
        tensors = load_file(narrow / FILE)
        tensors |= {name: x + np.int32(0x11111111) for name, x in tensors.items() if name.endswith(".qzeros")}
        save_file(tensors, narrow / FILE, metadata={"format": "pt"})
    assert not assert_reads(narrow, tmp_path / "again")["layers.0.mlp.down"].zeros


def damage(folder, name, change):
    """The tensors of a folder, of which one is changed; its numbers are in their dtype."""
    tensors = open_tensors(folder)
    array = tensors[name].stored().copy()
    change(array)
    return tensors | {name: tensors[name]._replace(data=array.view(np.uint8).reshape(-1))}


@pytest.mark.parametrize(
    ("name", "end", "bad"),
    [
        *(("fp8-block", ".weight_scale_inv", bad) for bad in (np.nan, np.inf)),
        ("fp8-block-ue8m0", ".weight_scale_inv", np.nan),
        ("float-quantized-channel", ".weight_scale", -np.inf),
        ("pack-quantized-4", ".weight_scale", np.nan),
        ("awq", ".scales", np.inf),
        ("gptq", ".scales", np.nan),
    ],
)
def test_scales_that_are_no_numbers_are_refused(name, end, bad, wide, tmp_path):
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", name)
    module = "model.layers.1.mlp.down_proj"
    tensors = damage(tmp_path / "narrow", module + end, lambda scales: scales.__setitem__((..., -1), bad))
    weight = narrowed({"quantization_config": WRITERS[name][0]}, tensors)[f"{module}.weight"]
    with pytest.raises(CheckpointError, match=rf"{re.escape(module + end)} holds scales that are no numbers.*again"):
        weight.numbers()


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("name", ["fp8-tensor", "float-quantized-block"])
def test_float8_numbers_that_are_none_are_refused(name, code, wide, tmp_path):
    """Kernels that widen by way of float16 would read them as 480, others as NaN."""
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", name)
    odd = "model.layers.1.mlp.up_proj.weight"
    tensors = damage(tmp_path / "narrow", odd, lambda codes: codes.view(np.uint8).__setitem__((3, 5), code))
    weight = narrowed({"quantization_config": WRITERS[name][0]}, tensors)[odd]
    with pytest.raises(CheckpointError, match=rf"{re.escape(odd)} holds numbers that are NaN"):
        weight.numbers()


def test_inputs_ordered_by_activations_are_refused(wide, tmp_path):
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", "gptq")
    name = "model.layers.0.mlp.down_proj.g_idx"
    tensors = load_file(tmp_path / "narrow" / FILE)
    tensors[name] = tensors[name][::-1].copy()
    save_file(tensors, tmp_path / "narrow" / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} orders inputs .*desc_act=False"):
        load(tmp_path / "narrow", jnp.float32)


@pytest.mark.parametrize(
    ("name", "end", "fields"),
    [
        *((name, ".weight_scale_inv", {}) for name in ("fp8-block", "fp8-block-ue8m0")),
        *((name, ".weight_scale", {}) for name in ("fp8-tensor", "float-quantized-channel", "int-quantized")),
        ("pack-quantized-4", ".weight_shape", {}),
        ("awq", ".scales", {}),
        ("gptq", ".qzeros", {}),
        ("gptq", ".g_idx", {"desc_act": True}),
    ],
)
def test_weights_that_lack_a_part_are_refused(name, end, fields, wide, tmp_path):
    """Even where what is left would pass for a weight."""
    config = WRITERS[name][0] | fields
    write_narrow(wide, tmp_path / "narrow", tmp_path / "again", name)
    tensors = open_tensors(tmp_path / "narrow")
    del tensors[f"model.layers.0.mlp.down_proj{end}"]
    with pytest.raises(CheckpointError, match=r"lack model\.layers\.0\.mlp\.down_proj\.\w+, which the quantized"):
        narrowed({"quantization_config": config}, tensors)


ODD = st.sampled_from([None, True, 0, -1, 3, 4, 2**70, 0.5, "", "x", [], [1], [128, 128], {}, {"a": 1}, "\\ud800"])


@pytest.mark.parametrize("name", ["fp8-block", "float-quantized-block", "pack-quantized-4-zeros", "awq", "gptq"])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_absurd_configurations_are_read_or_refused(name, wide, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / f"absurd {name}"
    if not folder.exists():
        write_narrow(wide, folder, folder.with_name(f"absurd again {name}"), name)
    fields = data.draw(damaged(WRITERS[name][0], ODD))
    tensors = open_tensors(folder)
    for tensor in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        of = tensors.pop(tensor)
        dtype = data.draw(st.sampled_from([None, "I32", "U8", "F16", "F4", of.dtype]))
        if dtype is not None:
            shape = data.draw(st.sampled_from([of.shape[::-1], (), (1, *of.shape), (of.data.size,), (0, 3)]))
            if math.prod(shape) * {"I32": 4, "F32": 4, "F16": 2}.get(dtype, 1) == of.data.size:
                tensors[tensor] = of._replace(dtype=dtype, shape=shape)
    with contextlib.suppress(CheckpointError):
        for weight in narrowed({"quantization_config": fields}, tensors).values():
            weight.array()
