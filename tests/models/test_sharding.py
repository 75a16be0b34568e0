"""Parameters on several (simulated) devices: each its own part, from whatever they are read, and nobody the whole."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from support.wide import MIXED, WIDE, wide_decoder

from astraea_jax.models.checkpoint import load, random_decoder, save_hf, save_orbax
from astraea_jax.models.config import CheckpointError, Experts
from astraea_jax.models.formats import FORMATS, Format
from astraea_jax.models.matrix import everywhere, plain
from astraea_jax.models.published import PUBLISHED
from astraea_jax.models.sharding import AXES, abstract_decoder, check_mesh, mesh_of, spec

FEATURES = dataclasses.replace(MIXED, experts=Experts(6, 2, 32, biases=True))
"""Six experts are divided by their features, among four devices."""
SHAPES = [
    MIXED,
    FEATURES,
    WIDE,
    dataclasses.replace(WIDE, tie_embeddings=True, qkv_bias=False, qk_norm=True, sinks=True),
]


@pytest.fixture
def mesh():
    return mesh_of(jax.devices()[2:6])


def whole(path, shape=(), devices=4) -> bool:
    """Whether no axis of a parameter is divided: norms, routers, biases of outputs unless by whole experts."""
    return path[-1] in ("scale", "o_bias", "router", "router_bias", "correction") or (
        path[-1] == "down_bias" and shape[:1] == (6,) and 6 % devices
    )


def check_parts(decoder, mesh) -> None:
    """Each array lies as the rules say, and what is divided is divided evenly."""
    for path, leaf in nnx.to_flat_state(nnx.state(decoder)):
        array = leaf[...]
        assert array.sharding == jax.sharding.NamedSharding(mesh, spec(path, array.shape, mesh)), path
        parts = {shard.device: shard.data for shard in array.addressable_shards}
        assert set(parts) == set(mesh.devices.flat)
        pieces = 1 if whole(path, array.shape) else mesh.size
        assert {part.size for part in parts.values()} == {array.size // pieces}, path


@pytest.mark.parametrize("save", [save_hf, save_orbax])
def test_checkpoints_are_read_into_their_shardings(save, mesh, tmp_path):
    whole = wide_decoder()
    save(whole, tmp_path)
    decoder = load(tmp_path, jnp.float32, mesh)
    check_parts(decoder, mesh)
    for ours, theirs in zip(jax.tree.leaves(nnx.state(decoder)), jax.tree.leaves(nnx.state(whole)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_stacked_layers_lie_as_each_layer_did(mesh, tmp_path):
    save_hf(wide_decoder(), tmp_path)
    decoder = load(tmp_path, jnp.float32, mesh)
    apart = [dict(nnx.to_flat_state(nnx.state(layer))) for layer in decoder.layers]
    decoder.stack()
    decoder.stack()  # once is enough
    check_parts(decoder, mesh)
    stacked = dict(nnx.to_flat_state(nnx.state(decoder.layers.layers[0])))
    assert stacked.keys() == apart[0].keys()
    for path, leaf in stacked.items():
        np.testing.assert_array_equal(leaf[...], np.stack([layer[path][...] for layer in apart]))
    shapes = nnx.state(abstract_decoder(WIDE, jnp.float32, mesh, stacked=True))
    for ours, theirs in zip(jax.tree.leaves(nnx.state(decoder)), jax.tree.leaves(shapes), strict=True):
        assert (ours.shape, ours.sharding) == (theirs.shape, theirs.sharding)


def test_random_weights_are_made_where_they_belong(mesh):
    config = dataclasses.replace(SHAPES[-1], num_layers=1)  # the compiler is slow at random numbers
    check_parts(random_decoder(config, jnp.float32, 3, mesh), mesh)


@given(config=st.sampled_from([*PUBLISHED.values(), *SHAPES]), devices=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=12, deadline=None)
def test_every_matrix_of_every_shape_is_divided(config, devices):
    mesh = mesh_of(jax.devices()[:devices])
    config = dataclasses.replace(config, num_layers=1)
    if config.num_kv_heads % devices:
        with pytest.raises(CheckpointError, match=rf"key/value heads \({config.num_kv_heads}\).*multiple of {devices}"):
            abstract_decoder(config, jnp.bfloat16, mesh)
        return
    for path, leaf in nnx.to_flat_state(nnx.state(abstract_decoder(config, jnp.bfloat16, mesh))):
        part = math.prod(leaf.sharding.shard_shape(leaf.shape))
        undivided = whole(path, leaf.shape, devices) or (
            config.vocab_size in leaf.shape and config.vocab_size % devices
        )
        assert part == math.prod(leaf.shape) // (1 if undivided else devices), path


def test_the_feed_forward_size_must_divide_too():
    with pytest.raises(CheckpointError, match=r"feed-forward size \(98\).*choose a tensor_parallel of 1, 2$"):
        check_mesh(dataclasses.replace(WIDE, intermediate_size=98), mesh_of(jax.devices()[:4]))


def test_experts_divide_by_their_number_or_by_their_features(mesh):
    assert spec(("layers", 0, "mlp", "down", "weight"), (8, 32, 64), mesh) == P("tp")
    assert spec(("layers", 0, "mlp", "down", "weight"), (6, 32, 64), mesh) == P(None, "tp")
    assert spec(("layers", 0, "mlp", "gate_up", "scales"), (6, 1, 64), mesh) == P(None, None, "tp")
    neither = dataclasses.replace(MIXED, experts=Experts(6, 2, 30, shared_size=48))
    with pytest.raises(CheckpointError, match=r"experts or their feed-forward size \(6 or 30\).*of 1, 2, 3, 6$"):
        check_mesh(dataclasses.replace(neither, num_heads=12, num_kv_heads=12), mesh)
    shared = dataclasses.replace(MIXED, experts=Experts(8, 2, 32, shared_size=50))
    with pytest.raises(CheckpointError, match=r"shared experts' feed-forward size \(50\).*of 1, 2$"):
        check_mesh(shared, mesh)


SHARES = {
    "groups of inputs": (4, Format("int8", inputs=16), {}, "1, 2"),
    "as many blocks as devices, but others": (2, Format("fp8", 64, 8), {"size": 96}, "1"),
    "half a block of packed codes": (2, Format("int4"), {"size": 96}, "1"),
}


@pytest.mark.parametrize("case", SHARES)
def test_experts_without_their_scales_are_refused_before_anything_is_read(case):
    devices, form, fields, fit = SHARES[case]
    experts = Experts(7, 3, **{"size": 32, **fields})
    config = dataclasses.replace(MIXED, experts=experts)
    said = rf"divide its 7 experts, .* blocks of {form.codes} codes.*tensor_parallel of {fit}, or weights in another"
    with pytest.raises(CheckpointError, match=said):
        abstract_decoder(config, jnp.float32, mesh_of(jax.devices()[:devices]), forms=everywhere(form))


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_shared_experts_that_cannot_be_divided_are_whole_everywhere(devices, caplog):
    """1,408 features of GLM-4.5-Air are 11 groups of 128 codes."""
    caplog.set_level("INFO")
    config, mesh = dataclasses.replace(PUBLISHED["glm-4.5-air"], num_layers=2), mesh_of(jax.devices()[:devices])
    for forms, divided in ((everywhere(FORMATS["int4"]), False), (plain, True)):
        decoder: Any = abstract_decoder(config, jnp.bfloat16, mesh, forms=forms)
        mlp = nnx.state(decoder.layers[1].mlp)
        for path, leaf in nnx.to_flat_state(mlp):
            parts = leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0]
            if path[0] in ("gate_up", "down"):
                assert parts == devices, path
            if path[0] == "shared":
                assert leaf.sharding.is_fully_replicated is not divided, path
    assert caplog.text.count("devices do not divide the shared experts of 1 layers") == 1


def test_a_vocabulary_that_does_not_divide_is_whole_everywhere(mesh):
    assert spec(("embed", "weight"), (260, 64), mesh) == P("tp")
    assert spec(("embed", "weight"), (261, 64), mesh) == P()
    assert spec(("lm_head", "weight"), (64, 261), mesh) == P()


def test_every_name_of_the_rules_is_a_parameter():
    """A parameter that is called otherwise would be whole on every device."""
    names = set()
    for config in SHAPES:
        for path, _ in nnx.to_flat_state(nnx.state(abstract_decoder(config, jnp.float32, mesh_of(jax.devices()[:1])))):
            names.add(".".join(map(str, path[2:] if path[0] == "layers" else path)))
    assert set(AXES) == {name for name in names if not whole(name.split("."))}


def test_scales_go_with_their_weights():
    """Shapes as in ``models/decoder.py``: blocks of inputs, and outputs."""
    mesh = mesh_of(jax.devices()[:2])
    for name, shape, divided in (
        (("attention", "qkv", "scales"), (1, 192), (None, "tp")),
        (("attention", "o", "scales"), (1, 64), ()),
        (("mlp", "gate_up", "scales"), (2, 96), (None, "tp")),
        (("mlp", "down", "scales"), (2, 64), ("tp",)),
    ):
        assert spec(("layers", 0, *name), shape, mesh) == jax.sharding.PartitionSpec(*divided), name
