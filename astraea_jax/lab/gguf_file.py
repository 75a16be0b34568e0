"""Writes a Hugging Face checkpoint as a GGUF file in float32, with a vocabulary of numbers instead of text.

  python astraea_jax/lab/gguf_file.py FOLDER FILE

For llama.cpp under loads of token ids; it needs the packages gguf and safetensors, and nothing of this one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file


def write(folder: Path, file: Path) -> None:
    """Write the checkpoint of ``folder``, of Llama's or Qwen's kind."""
    hf = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, hf["model_type"])
    _write_shape(writer, hf)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[hf["model_type"].upper()], hf["num_hidden_layers"])
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            values = tensor.astype(np.float32)
            if hf["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                values = _in_pairs(values, hf["head_dim"])
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise SystemExit(f"{name} has no name in a GGUF file of a {hf['model_type']}")
            writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, hf: dict[str, Any]) -> None:
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_rope_dimension_count(hf["head_dim"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_vocab_size(hf["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"▁{i}" for i in range(hf["vocab_size"])])
    writer.add_token_scores([0.0] * hf["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * hf["vocab_size"])
    writer.add_add_bos_token(False)


def _in_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Interleave the halves of each head of ``[heads * head_dim, inputs]``: llama.cpp rotates neighbours in a Llama."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    write(given.folder, given.file)
