"""A tiny random model with a byte-level tokenizer, as a Hugging Face folder, and engines that serve it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.sizes import SMALL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from astraea_jax.config import EngineConfig
from astraea_jax.engine import Engine
from astraea_jax.models.checkpoint import load_hf, save_hf
from astraea_jax.models.config import ModelConfig
from astraea_jax.models.decoder import Decoder

COMPILED = tempfile.TemporaryDirectory(prefix="astraea-compiled-")
"""What one test or process has compiled, the others find here; most of the time of a run would be compilation."""
os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

jax.config.update("jax_num_cpu_devices", 8)  # simulated; what does not ask for more runs on the first

RANDOM = ModelConfig(
    vocab_size=260,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=256,
    tie_embeddings=True,
    qk_norm=True,
)
EOS = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that greedy choices differ clearly; every byte is a token."""
    folder = tmp_path_factory.mktemp("random-model")
    decoder = Decoder(RANDOM, dtype=jnp.float32, rngs=nnx.Rngs(0))
    nnx.update(decoder, jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, nnx.state(decoder)))
    save_hf(decoder, folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", EOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def make_engine(random_folder: Path) -> Iterator[Callable[..., Engine]]:
    """``make_engine(config)`` gives a started engine of the random model; equal configurations share one."""
    made: dict[EngineConfig, Engine] = {}
    with ExitStack() as stack:

        def make(config: EngineConfig = SMALL) -> Engine:
            if config not in made:
                made[config] = Engine.from_folder(random_folder, config)
                made[config].start()
                stack.callback(made[config].shutdown, grace_s=0)
            return made[config]

        yield make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


@pytest.fixture(scope="session")
def greedy(random_folder: Path) -> Callable[[list[int], int], list[int]]:
    """``greedy(prompt, n)``: n tokens by dense attention over the whole text, one at a time, without any cache."""
    decoder = load_hf(random_folder, jnp.float32)
    graph, state = nnx.split(decoder)
    length = RANDOM.max_position

    def attend(_, q, k, v, cache):
        return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0], cache

    @jax.jit
    def scores(state, tokens, last):
        model = nnx.merge(graph, state)
        hidden, _ = model(tokens, jnp.arange(length), (None,) * RANDOM.num_layers, attend)
        return model.logits(hidden[last])

    def generate(prompt: list[int], n: int) -> list[int]:
        tokens = np.zeros(length, np.int32)
        tokens[: len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + n):
            tokens[at] = int(scores(state, tokens, at - 1).argmax())
        return tokens[len(prompt) : len(prompt) + n].tolist()

    return generate


SERVE = [sys.executable, str(Path(__file__).parents[1] / "scripts" / "serve.py")]


@dataclass
class ServingProcess:
    process: subprocess.Popen[str]
    address: str
    said: str
    """Until it was ready."""


@pytest.fixture(scope="session")
def serve(random_folder: Path) -> Callable[..., AbstractContextManager[ServingProcess]]:
    """``with serve(*flags) as server:`` runs scripts/serve.py with the random model on a free port."""

    @contextmanager
    def start(*arguments: str) -> Iterator[ServingProcess]:
        sizes = ("--max_seqs=16", "--max_step_tokens=16", f"--kv_bytes={2 * 2**20}")
        command = [*SERVE, f"--model={random_folder}", "--port=0", *sizes, *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert process.stderr is not None
        try:
            said = ""
            for line in process.stderr:
                said += line
                if found := re.search(r"ready on (\S+) in", line):
                    break
            else:
                pytest.fail(f"the server ended with status {process.wait()}: {said}")
            yield ServingProcess(process, found[1], said)
        finally:
            process.kill()
            process.communicate()

    return start


@pytest.fixture(scope="session")
def serve_fails() -> Callable[..., str]:
    """``serve_fails(*flags)`` is what scripts/serve.py says when it does not start; its exit status is 1."""

    def run(*arguments: str) -> str:
        done = subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done.stderr
        return done.stderr

    return run
