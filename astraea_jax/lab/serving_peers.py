"""Other engines on the load of bench_serving.py, each in a process of its own: weights are random, or the checkpoint's.

  python -m astraea_jax.lab.serving_peers torch LOAD.json RESULT.json

LOAD.json, as bench_serving.py writes it: ``hf`` (a Hugging Face configuration), ``folder`` (a checkpoint, or null for
random weights), ``dtype``, ``prompts`` (lists of token ids), ``outputs`` (tokens each shall make), ``max_seqs`` and
``max_step_tokens``. RESULT.json gets ``seconds``, ``output_tokens``, ``start_s``, ``version`` and ``note``.

``torch`` is no engine but what one built on PyTorch could reach at most: the products and the attention of the same
shapes and nothing else, in full batches of equal lengths, in a CUDA graph where there is CUDA. vLLM and SGLang have not
been run by us yet.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Load = dict[str, Any]
Result = dict[str, Any]


def transformers(load: Load) -> Result:
    """Run transformers' continuous batching; the start of its manager is not timed."""
    import torch
    import transformers as library
    from transformers.generation.continuous_batching.utils import WorkloadHints

    began = time.perf_counter()
    torch.manual_seed(0)
    dtype, device = getattr(torch, load["dtype"]), "cuda" if torch.cuda.is_available() else "cpu"
    if load["folder"]:
        model = library.AutoModelForCausalLM.from_pretrained(load["folder"], dtype=dtype).to(device).eval()
    else:
        with torch.device(device):
            config = library.AutoConfig.for_model(**load["hf"])
            model = library.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    batching = library.ContinuousBatchingConfig(
        max_requests_per_batch=load["max_seqs"],
        allow_block_sharing=False,  # no two prompts begin alike
        num_blocks=None if device == "cuda" else _blocks(load, 256),  # on a CPU it would take most of the memory
        max_batch_tokens=None if device == "cuda" else load["max_step_tokens"],
    )
    greedy = library.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(max(map(len, load["prompts"])), max(load["outputs"]), len(load["prompts"]))
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=batching, workload_hints=hints, timeout=5
    ) as manager:

        def run(count: int) -> int:
            """Tokens generated for the first ``count`` prompts."""
            for prompt, output in zip(load["prompts"][:count], load["outputs"]):
                manager.add_request(prompt, max_new_tokens=output, eos_token_id=-1)
            made = finished = 0
            while finished < count:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise SystemExit("its generation thread ended")
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise SystemExit(result.error)
                    made, finished = made + len(result.generated_tokens), finished + 1
            return made

        run(min(2, len(load["prompts"])))
        start_s, began = time.perf_counter() - began, time.perf_counter()
        made = run(len(load["prompts"]))
        seconds = time.perf_counter() - began
    note = f"continuous batching, {model.config._attn_implementation} attention, {device}"
    return _result(seconds, made, start_s, library.__version__, note)


def _blocks(load: Load, size: int) -> int:
    return sum(-(-(len(prompt) + output) // size) + 1 for prompt, output in zip(load["prompts"], load["outputs"]))


def torch(load: Load) -> Result:
    """Run full batches of ``max_seqs`` prompts of mean length.

    Prefill runs in passes, then all decode together, every step at the mean context.
    """
    import torch as library

    began = time.perf_counter()
    library.manual_seed(0)
    device = "cuda" if library.cuda.is_available() else "cpu"
    count = len(load["prompts"])
    batch, output = min(load["max_seqs"], count), round(sum(load["outputs"]) / count)
    prompt = round(sum(map(len, load["prompts"])) / count)
    with library.inference_mode():
        model = _Products(load["hf"], getattr(library, load["dtype"]), device)
        prefill = model.prefill(batch, prompt, max(1, load["max_step_tokens"] // prompt))
        decode = model.decode(batch, prompt + output // 2)
        start_s = time.perf_counter() - began
        prefill_s, step_s = _seconds(prefill, 4, device), _seconds(decode, 8, device)
    seconds = count / batch * (prefill_s + (output - 1) * step_s)
    note = f"products and attention only, {device}; prefill {1e3 * prefill_s:.1f} ms, step {1e3 * step_s:.2f} ms"
    return _result(seconds, sum(load["outputs"]), start_s, library.__version__, note)


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


def vllm(load: Load) -> Result:
    """Run vLLM's ``LLM.generate`` with dummy weights."""
    import vllm as library

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = library.LLM(
            model=_config_folder(load, folder),
            load_format="auto" if load["folder"] else "dummy",
            skip_tokenizer_init=True,
            dtype=load["dtype"],
            max_num_seqs=load["max_seqs"],
            max_model_len=_longest(load),
            enable_prefix_caching=False,
        )
        start_s = time.perf_counter() - began
        params = [
            library.SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, detokenize=False)
            for n in load["outputs"]
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in load["prompts"]]
        model.generate(prompts[:2], params[:2], use_tqdm=False)
        began = time.perf_counter()
        done = model.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
    return _result(
        seconds, sum(len(o.outputs[0].token_ids) for o in done), start_s, library.__version__, "LLM.generate"
    )


def sglang(load: Load) -> Result:
    """Run SGLang's ``Engine.generate`` with dummy weights."""
    import sglang as library

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engine = library.Engine(
            model_path=_config_folder(load, folder),
            load_format="auto" if load["folder"] else "dummy",
            skip_tokenizer_init=True,
            dtype=load["dtype"],
            max_running_requests=load["max_seqs"],
            context_length=_longest(load),
            disable_radix_cache=True,
        )
        start_s = time.perf_counter() - began
        params = [{"max_new_tokens": n, "temperature": 0.0, "ignore_eos": True} for n in load["outputs"]]
        engine.generate(input_ids=load["prompts"][:2], sampling_params=params[:2])
        began = time.perf_counter()
        done = engine.generate(input_ids=load["prompts"], sampling_params=params)
        seconds = time.perf_counter() - began
        engine.shutdown()
    made = sum(output["meta_info"]["completion_tokens"] for output in done)
    return _result(seconds, made, start_s, library.__version__, "Engine.generate")


def _longest(load: Load) -> int:
    return max(len(prompt) + output for prompt, output in zip(load["prompts"], load["outputs"])) + 1


def _config_folder(load: Load, folder: str) -> str:
    """A checkpoint folder: the load's, or one with nothing but the configuration."""
    if load["folder"]:
        return load["folder"]
    (Path(folder) / "config.json").write_text(json.dumps({**load["hf"], "torch_dtype": load["dtype"]}))
    return folder


def _result(seconds: float, tokens: int, start_s: float, version: str, note: str) -> Result:
    return {"seconds": seconds, "output_tokens": tokens, "start_s": start_s, "version": version, "note": note}


PEERS: dict[str, Callable[[Load], Result]] = {f.__name__: f for f in (transformers, torch, vllm, sglang)}
"""Peers by the name of the package that must be installed."""


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("load", type=Path)
    parser.add_argument("result", type=Path)
    given = parser.parse_args()
    given.result.write_text(json.dumps(PEERS[given.peer](json.loads(given.load.read_text()))))
