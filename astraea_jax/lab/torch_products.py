"""What an engine built on PyTorch could reach at most on a load: its products and attention, and nothing else.

  python astraea_jax/lab/torch_products.py LOAD.json RESULT.json

They run in full batches of equal lengths, in a CUDA graph where there is CUDA. LOAD.json, as bench_serving.py writes
it: ``hf`` (a Hugging Face configuration), ``dtype``, ``inputs`` and ``outputs`` (tokens of each prompt and its answer),
``max_seqs`` and ``max_step_tokens``. RESULT.json gets ``seconds``, ``output_tokens``, ``start_s``, ``version`` and
``note``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure(load: dict[str, Any]) -> dict[str, Any]:
    """Run full batches of ``max_seqs`` prompts of mean length.

    Prefill runs in passes, then all decode together, every step at the mean context.
    """
    import torch

    began = time.perf_counter()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = len(load["inputs"])
    batch, output = min(load["max_seqs"], count), round(sum(load["outputs"]) / count)
    prompt = round(sum(load["inputs"]) / count)
    with torch.inference_mode():
        model = _Products(load["hf"], getattr(torch, load["dtype"]), device)
        prefill = model.prefill(batch, prompt, max(1, load["max_step_tokens"] // prompt))
        decode = model.decode(batch, prompt + output // 2)
        start_s = time.perf_counter() - began
        prefill_s, step_s = _seconds(prefill, 4, device), _seconds(decode, 8, device)
    seconds = count / batch * (prefill_s + (output - 1) * step_s)
    note = f"products and attention only, {device}; prefill {1e3 * prefill_s:.1f} ms, step {1e3 * step_s:.2f} ms"
    return {
        "seconds": seconds,
        "output_tokens": sum(load["outputs"]),
        "start_s": start_s,
        "version": torch.__version__,
        "note": note,
    }


class _Products:
    """The matrices of a decoder, and its products and attention. No norms, positions or pages."""

    def __init__(self, hf: dict[str, Any], dtype: Any, device: str):
        import torch

        self.kv_heads, self.dim = hf["num_key_value_heads"], hf["head_dim"]
        self.heads, hidden, inner = hf["num_attention_heads"], hf["hidden_size"], hf["intermediate_size"]
        self.new = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
        weight = lambda rows, columns: self.new(rows, columns).mul_(rows**-0.5)  # noqa: E731
        wide = (self.heads + 2 * self.kv_heads) * self.dim
        shapes = ((hidden, wide), (self.heads * self.dim, hidden), (hidden, 2 * inner), (inner, hidden))
        self.layers = [[weight(*shape) for shape in shapes] for _ in range(hf["num_hidden_layers"])]
        self.head, self.hidden, self.device = weight(hidden, hf["vocab_size"]), hidden, device

    def prefill(self, batch: int, length: int, at_once: int) -> Callable[[], Any]:
        """``batch`` prompts of ``length``, ``at_once`` of them in a pass."""
        passes = [min(at_once, batch - i) for i in range(0, batch, at_once)]
        inputs = [self.new(n, length, self.hidden) for n in passes]
        return lambda: [self._forward(x, None) for x in inputs][-1]

    def decode(self, batch: int, context: int) -> Callable[[], Any]:
        """Decode one token of each of ``batch`` contexts."""
        import torch

        caches = [
            [self.new(batch, self.kv_heads, context, self.dim) for _ in range(2)] for _ in range(len(self.layers))
        ]
        x = self.new(batch, 1, self.hidden)
        if self.device == "cpu":
            return lambda: self._forward(x, caches)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._forward(x, caches)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward(x, caches)
        return graph.replay

    def _forward(self, x: Any, caches: list[list[Any]] | None) -> Any:
        """``x [B, T, H]`` -> the chosen token of each last position, ``[B]``."""
        import torch.nn.functional as F

        rows, length, _ = x.shape
        for i, (qkv, out, gate_up, down) in enumerate(self.layers):
            heads = (x @ qkv).view(rows, length, -1, self.dim).transpose(1, 2)
            q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            if caches is not None:
                k, v = caches[i]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=caches is None, enable_gqa=True)
            x = x + y.transpose(1, 2).reshape(rows, length, -1) @ out
            gate, up = (x @ gate_up).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ down  # the sums keep numbers usual; tiny ones are slow
        return (x[:, -1] @ self.head).argmax(-1)


def _seconds(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Shortest of several runs, after one to warm up."""
    import torch

    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", type=Path)
    parser.add_argument("result", type=Path)
    given = parser.parse_args()
    given.result.write_text(json.dumps(measure(json.loads(given.load.read_text()))))
