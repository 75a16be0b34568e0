"""A tiny random model with a byte-level tokenizer, as a Hugging Face folder, and engines that serve it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.engines import end_all_sessions
from support.forked import say
from support.random_model import RANDOM
from support.sizes import SMALL
from support.wide import TIGHT, wide_decoder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from astraea_jax.engine.config import EngineConfig
from astraea_jax.engine.engine import Engine
from astraea_jax.models.checkpoint import copy_beside, load_hf, save_hf
from astraea_jax.models.decoder import Decoder
from astraea_jax.models.operations import Operations
from astraea_jax.models.tokenizer import Tokenizer as Tokens

OWN = tempfile.TemporaryDirectory(prefix="astraea-compiled-")
COMPILED = os.environ.get("JAX_COMPILATION_CACHE_DIR", OWN.name)
"""Others find here what one test or process has compiled; most of the time of a run would be compilation."""
os.environ |= {"JAX_COMPILATION_CACHE_DIR": COMPILED, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

hypothesis.settings.register_profile("any machine", deadline=None)  # no test depends on how fast it is
hypothesis.settings.load_profile("any machine")

jax.config.update("jax_num_cpu_devices", 8)  # simulated; what does not ask for more runs on the first

EOS = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, large enough that greedy choices differ clearly; every byte is a token."""
    folder = tmp_path_factory.mktemp("random-model")
    decoder = nnx.eval_shape(lambda: Decoder(RANDOM, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)  # quicker than to compile JAX's draws
    fill = lambda x: rng.normal(0, 0.16, x.shape) if len(x.shape) > 1 else np.ones(x.shape)  # noqa: E731
    nnx.update(decoder, jax.tree.map(lambda x: jnp.asarray(fill(x), x.dtype), nnx.state(decoder)))
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
    engine = make_engine()
    end_all_sessions(engine)
    return engine


@pytest.fixture(scope="session")
def wide_folder(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide-model")
    save_hf(wide_decoder(), folder)
    copy_beside(random_folder, folder)
    return folder


@pytest.fixture(scope="session")
def wide_engine(random_folder: Path) -> Iterator[Engine]:
    """The model that several devices can share, on one device."""
    engine = Engine(wide_decoder(), Tokens.from_folder(random_folder), TIGHT)
    engine.start()
    yield engine
    engine.shutdown(grace_s=0)


@pytest.fixture(scope="session")
def dense(random_folder: Path) -> Callable[[Sequence[int]], np.ndarray]:
    """``dense(tokens)``: logits ``[n, V]`` after each of n tokens, by dense attention, without any cache."""
    decoder = load_hf(random_folder, jnp.float32)
    graph, state = nnx.split(decoder)
    length = RANDOM.max_position

    def attend(_, heads, cache):
        q, k, v = heads.rotated()
        return jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0], cache

    @jax.jit
    def logits(state, tokens):
        model = nnx.merge(graph, state)
        hidden, _ = model(tokens, jnp.arange(length), (None,) * RANDOM.num_layers, Operations(attend))
        return model.logits(hidden)

    def compute(tokens: Sequence[int]) -> np.ndarray:
        padded = np.zeros(length, np.int32)  # fresh: on a CPU the device may still read an old one
        padded[: len(tokens)] = tokens
        return np.asarray(logits(state, padded))[: len(tokens)]

    return compute


@pytest.fixture(scope="session")
def greedy(dense: Callable[[Sequence[int]], np.ndarray]) -> Callable[..., list[int]]:
    """``greedy(prompt, n)``: n tokens by dense attention over the whole text, without any cache.

    A text whose every token is the likeliest after those before it can only be the greedy one. So one is guessed and
    each token replaced by the likeliest at its place until none changes: every turn one more is right at least, and
    the right ``guess`` takes one turn.
    """

    def generate(prompt: list[int], n: int, guess: Sequence[int] = ()) -> list[int]:
        text = [*guess[:n], *[0] * (n - len(guess))]
        while True:
            better = dense([*prompt, *text])[len(prompt) - 1 : -1].argmax(-1).tolist()
            if text == better:
                return text
            text = better

    return generate


SERVE = [sys.executable, str(Path(__file__).parents[1] / "scripts" / "serve.py")]


@dataclass
class ServingProcess:
    process: subprocess.Popen[str]
    address: str
    said: str
    """Until it was ready."""

    @property
    def http(self) -> str:
        """Where HTTP is served."""
        [url] = re.findall(r"HTTP: (\S+)/v1", self.said)
        return url


@pytest.fixture(scope="session")
def serve(random_folder: Path) -> Callable[..., AbstractContextManager[ServingProcess]]:
    """``with serve(*flags) as server:`` runs scripts/serve.py with the random model on a free port, after the
    Python code ``before``."""

    @contextmanager
    def start(*arguments: str, before: str = "") -> Iterator[ServingProcess]:
        names = ("max_seqs", "max_step_tokens", "page_size", "kv_bytes", "dtype")
        sizes = [f"--{name}={getattr(SMALL, name)}" for name in names]  # so that its steps have been compiled already
        program = (
            SERVE
            if not before
            else [sys.executable, "-c", f"{before}\nimport runpy\nrunpy.run_path({SERVE[1]!r}, run_name='__main__')"]
        )
        command = [*program, f"--model={random_folder}", "--port=0", "--http_port=0", *sizes, *arguments]
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
        status, said = say(SERVE[1], *arguments)
        assert status == 1, said
        return said

    return run
