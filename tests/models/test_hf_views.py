"""Checkpoints of other families, as transformers and others lay them out, become the same decoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.decoders import assert_same, flat

from astraea_jax.models.checkpoint import copy_beside, load, load_hf, save_orbax
from astraea_jax.models.config import CheckpointError

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"


@pytest.fixture
def copied(tmp_path):
    """``copied(name)`` is a copy of a golden checkpoint."""
    return lambda name: Path(shutil.copytree(GOLDENS / name, tmp_path / name))


def rewrite(folder, change, **fields):
    """Change the tensors of a folder, and fields of its configuration."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDENS.iterdir()))
def test_every_family_becomes_an_orbax_folder(name, tmp_path):
    decoder = load_hf(GOLDENS / name, jnp.float32)
    save_orbax(decoder, tmp_path, GOLDENS / name / "config.json")
    copy_beside(GOLDENS / name, tmp_path)
    assert (tmp_path / "config.json").read_text() == (GOLDENS / name / "config.json").read_text()
    assert_same(load(tmp_path, jnp.float32), decoder)


def test_an_own_head_stays_in_orbax_folders(copied, tmp_path):
    folder = copied("qwen3-gqa4-tied")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"][::-1].copy()}))
    decoder = load(folder, jnp.float32)
    save_orbax(decoder, tmp_path / "orbax", folder / "config.json")
    assert_same(load(tmp_path / "orbax", jnp.float32), decoder)


PREFIXES = {
    "transformers 4": ("language_model.model.", "language_model.lm_head.", "vision_tower."),
    "transformers 5": ("model.language_model.", "lm_head.", "model.vision_tower."),
}


@pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES)
def test_the_text_part_of_a_model_that_sees_pictures(prefixes, copied):
    folder = copied("ministral3-growth")
    expected = load(folder, jnp.float32)
    text = json.loads((folder / "config.json").read_text())
    inner, head, eyes = prefixes

    def change(tensors):
        named = {
            name.replace("model.", inner, 1) if name.startswith("model.") else name.replace("lm_head.", head): tensor
            for name, tensor in tensors.items()
        }
        return {**named, f"{eyes}patch_conv.weight": np.ones((2, 3), np.float32)}

    rewrite(folder, change, architectures=["Mistral3ForConditionalGeneration"], text_config=text)
    assert_same(load(folder, jnp.float32), expected)


def test_pictures_are_not_expected_elsewhere(copied):
    folder = copied("ministral3-growth")
    rewrite(folder, lambda t: t.update({"vision_tower.x.weight": np.ones(3, np.float32)}))
    with pytest.raises(CheckpointError, match=r"does not account for: vision_tower\.x"):
        load(folder, jnp.float32)


def joined(tensors, layer, count):
    """The experts of a layer as transformers 5 holds them in memory."""
    part = lambda e, name: tensors.pop(f"{layer}.mlp.experts.{e}.{name}_proj.weight")  # noqa: E731
    gate_up = np.stack([np.concatenate([part(e, "gate"), part(e, "up")]) for e in range(count)])
    return {
        f"{layer}.mlp.experts.gate_up_proj": gate_up,
        f"{layer}.mlp.experts.down_proj": np.stack([part(e, "down") for e in range(count)]),
    }


def test_experts_in_one_tensor(copied):
    folder = copied("qwen3moe-normed")
    expected = load(folder, jnp.float32)
    rewrite(folder, lambda t: t.update(joined(t, "model.layers.1", 8)))
    assert_same(load(folder, jnp.float32), expected)
    rewrite(folder, lambda t: t.update({"model.layers.1.mlp.experts.down_proj": np.zeros((7, 32, 24), np.float32)}))
    with pytest.raises(CheckpointError, match=r"lacks 8 tensors: model\.layers\.1\.mlp\.experts\.0\.down_proj"):
        load(folder, jnp.float32)


def test_missing_experts(copied):
    folder = copied("qwen3moe-normed")
    rewrite(folder, lambda t: {n: x for n, x in t.items() if "layers.2.mlp.experts.5." not in n})
    with pytest.raises(CheckpointError, match=r"lacks 3 tensors: model\.layers\.2\.mlp\.experts\.5\.down_proj\.weight"):
        load(folder, jnp.float32)


def test_biases_of_experts_are_not_left_out(copied):
    folder = copied("gptoss-sinks")
    rewrite(folder, lambda t: {n: x for n, x in t.items() if "down_proj_bias" not in n})
    with pytest.raises(CheckpointError, match=r"lacks 18 tensors: .*down_proj\.bias"):
        load(folder, jnp.float32)


def test_the_layer_that_predicts_further_tokens_is_left_out(copied):
    folder = copied("glm4moe-norms-biases")
    expected = load(folder, jnp.float32)
    more = {f"model.layers.{i}.eh_proj.weight": np.ones((2, 2), np.float32) for i in (3, 4)}
    rewrite(folder, lambda t: t.update({"model.layers.3.eh_proj.weight": more["model.layers.3.eh_proj.weight"]}))
    assert_same(load(folder, jnp.float32), expected)
    rewrite(folder, lambda t: t.update(more))
    with pytest.raises(CheckpointError, match=r"does not account for: model\.layers\.4\.eh_proj"):
        load(folder, jnp.float32)
    rewrite(folder, lambda t: t.update(more), num_nextn_predict_layers=2)
    assert_same(load(folder, jnp.float32), expected)


def test_fused_projections_of_another_size(copied):
    folder = copied("phi3-long-partial-tied")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    original = load_file(folder / "model.safetensors")[name]
    rewrite(folder, lambda t: t.update({name: np.concatenate([original, original[:1]])}))
    with pytest.raises(CheckpointError, match=r"does not account for: model\.layers\.0\.self_attn\.qkv_proj"):
        load(folder, jnp.float32)
    rewrite(folder, lambda t: t.update({name: original[:-1].copy()}))
    with pytest.raises(CheckpointError, match=r"v_proj\.weight has shape \(15, 32\); config\.json makes it \(16, 32\)"):
        load(folder, jnp.float32)
    rewrite(folder, lambda t: t.update({name: np.array(1, np.float32)}))
    with pytest.raises(CheckpointError, match="lacks 3 tensors"):
        load(folder, jnp.float32)


def test_numbers_are_rounded_once(copied):
    """Scales of norms are kept in float32, to which Gemma's 1 is added; so are sinks and the biases of a choice."""
    gemma, gpt = copied("gemma3-windows-ropes"), copied("gptoss-sinks")
    stored = load_file(gemma / "model.safetensors")["model.layers.0.self_attn.q_norm.weight"]
    scale = flat(load(gemma, jnp.bfloat16))["layers.0.attention.q_norm.scale"]
    np.testing.assert_array_equal(scale, stored + np.float32(1))
    assert flat(load(gpt, jnp.bfloat16))["layers.0.attention.sinks"].dtype == np.float32
