"""One engine, ours or another, in a process of its own that serves the loads it is told.

  python astraea_jax/lab/peer_engines.py vllm SETUP.json

It runs by its path and imports nothing of this package but for ``astraea``, so that each engine may have a Python
environment of its own. SETUP.json holds a :class:`Setup`. It writes lines of JSON: first a :class:`Ready`, or
``{"missing": PACKAGE}``; then, for each :class:`Load` on a line of standard input, a :class:`Served`. Every engine is
greedy, ignores the end of sequence, and keeps the KV of earlier turns while its memory allows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setup:
    """What an engine is started with; it chooses everything else itself."""

    folder: str
    """Hugging Face checkpoint; without weights in it they are random, for engines that can do that."""
    dtype: str
    """Of weights, activations and KV."""
    max_seqs: int
    """Requests that run at once."""
    pool_tokens: int
    """Tokens whose KV the engine holds."""
    max_context: int
    """Tokens of the longest request."""
    host_bytes: int
    """Memory for the KV of waiting programs, for engines that have such a tier."""

    @property
    def has_weights(self) -> bool:
        """Whether there is more than a configuration."""
        return any(Path(self.folder).glob("*.safetensors"))


@dataclass(frozen=True)
class Ready:
    """An engine that has started."""

    version: str
    note: str
    """How it runs, for people."""
    start_s: float


@dataclass(frozen=True)
class Load:
    """Programs that begin together. Each is a list of turns; a turn adds tokens to the context and makes others."""

    programs: list[list[list[int]]]
    outputs: list[int]
    """Tokens that each turn of a program makes."""
    wait_s: float = 0.0
    """Time between two turns of a program."""


@dataclass(frozen=True)
class Served:
    """What became of a load. Times in seconds."""

    seconds: float
    """Until the last token."""
    jct: list[float]
    """Completion time of each program."""
    ttft: list[float]
    """Times to first token, of all turns."""
    tokens: list[list[int]]
    """Tokens that each program was given, over all turns."""


@dataclass(frozen=True)
class Request:
    """A turn of a program."""

    prompt: list[int]
    output: int
    program: str
    last: bool


Generate = Callable[[Request], AsyncIterator[Sequence[int]]]
"""Yields the tokens of a request as they are made."""


async def serve(generate: Generate, load: Load, name: str) -> Served:
    """Run a load; ``name`` is that of no other load."""
    began = time.perf_counter()
    ttft: list[float] = []

    async def run(i: int) -> tuple[float, list[int]]:
        context: list[int] = []
        given: list[int] = []
        for turn, new in enumerate(load.programs[i]):
            if turn:
                await asyncio.sleep(load.wait_s)
            context += new
            request = Request(list(context), load.outputs[i], f"{name}-{i}", turn + 1 == len(load.programs[i]))
            submitted, made = time.perf_counter(), 0
            async for ids in generate(request):
                if not made:
                    ttft.append(time.perf_counter() - submitted)
                made += len(ids)
                context += ids
                given += ids
            if made != request.output:
                raise RuntimeError(f"{made} tokens came, {request.output} were asked for")
        return time.perf_counter() - began, given

    ran = await asyncio.gather(*(run(i) for i in range(len(load.programs))))
    jct = [time for time, _ in ran]
    return Served(max(jct), jct, ttft, [given for _, given in ran])


# -- engines --------------------------------------------------------------------------------------------------------

Engine = tuple[Generate, str, str]
"""How it generates, its version, and how it runs."""


async def astraea(setup: Setup) -> Engine:
    """Start our engine."""
    from astraea_jax.engine.config import EngineConfig
    from astraea_jax.engine.engine import Engine
    from astraea_jax.engine.sampling import SamplingParams
    from astraea_jax.kv_cache.arrays import page_bytes
    from astraea_jax.models.config_file import read_json
    from astraea_jax.models.families import read_config

    model = read_config(read_json(Path(setup.folder) / "config.json"))
    config = EngineConfig(dtype=setup.dtype, max_seqs=setup.max_seqs, host_kv_bytes=setup.host_bytes)
    # The time limit of a step is long, as one may last while this process is paused.
    page = page_bytes(model, config.backend(model), config.page_size, config.page_dtype())
    pages = 1 + -(-setup.pool_tokens // config.page_size)
    config = replace(config, kv_bytes=pages * page, max_context=setup.max_context, step_timeout_s=86_400.0)
    engine = Engine.from_folder(setup.folder, config)
    engine.start()

    async def generate(request: Request) -> AsyncIterator[Sequence[int]]:
        params = SamplingParams(max_tokens=request.output, ignore_eos=True)
        async for delta in engine.generate(request.prompt, params, session=request.program, final=request.last):
            yield delta.token_ids

    return generate, version("astraea-jax"), f"{config.policy}, host tier {setup.host_bytes >> 20} MiB"


async def vllm(setup: Setup) -> Engine:
    """Start vLLM; on a CPU with all processors that this process may use, where it would leave one unused."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    import vllm as library
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    on_cpu = library.platforms.current_platform.is_cpu()
    block = 128 if on_cpu else 16
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=setup.folder,
            load_format="auto" if setup.has_weights else "dummy",
            skip_tokenizer_init=True,
            dtype=setup.dtype,
            max_num_seqs=setup.max_seqs,
            max_model_len=setup.max_context,
            block_size=block,
            num_gpu_blocks_override=1 + -(-setup.pool_tokens // block),
            enable_prefix_caching=True,
            gpu_memory_utilization=0.1 if on_cpu else 0.9,  # on a CPU, a share of the memory that others use, too
        )
    )
    count = iter(range(sys.maxsize))

    async def generate(request: Request) -> AsyncIterator[Sequence[int]]:
        params = library.SamplingParams(max_tokens=request.output, temperature=0.0, ignore_eos=True, detokenize=False)
        params.output_kind = RequestOutputKind.DELTA
        prompt = {"prompt_token_ids": request.prompt}
        async for output in engine.generate(prompt, params, request_id=str(next(count))):
            yield output.outputs[0].token_ids

    return generate, library.__version__, f"prefix caching, blocks of {block}"


async def transformers(setup: Setup) -> Engine:
    """Start transformers' continuous batching."""
    import torch
    import transformers as library

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, setup.dtype)
    if setup.has_weights:
        model = library.AutoModelForCausalLM.from_pretrained(setup.folder, dtype=dtype).to(device)
    else:
        with torch.device(device):
            config = library.AutoConfig.from_pretrained(setup.folder)
            model = library.AutoModelForCausalLM.from_config(config, dtype=dtype)
    batching = library.ContinuousBatchingConfig(
        max_requests_per_batch=setup.max_seqs,
        allow_block_sharing=True,
        num_blocks=-(-setup.pool_tokens // 256),  # tokens of a block, by default
        max_batch_tokens=512 if device == "cpu" else None,  # by itself it takes most of the memory
    )
    greedy = library.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.eval().init_continuous_batching(generation_config=greedy, continuous_batching_config=batching)
    if device == "cuda":
        manager.warmup()
    manager.start()
    count = iter(range(sys.maxsize))

    async def generate(request: Request) -> AsyncIterator[Sequence[int]]:
        name, made = str(next(count)), 0
        results: asyncio.Queue[Any] = asyncio.Queue()
        manager.register_result_handler(name, results.put_nowait)
        manager.add_request(request.prompt, name, max_new_tokens=request.output, streaming=True, eos_token_id=-1)
        while True:
            result = await results.get()
            if result.error is not None:
                raise RuntimeError(result.error)
            yield result.generated_tokens[made:]
            made = len(result.generated_tokens)
            if result.is_finished():
                return

    return generate, library.__version__, f"continuous batching, {model.config._attn_implementation}, {device}"


async def llama_cpp(setup: Setup) -> Engine:
    """Start llama.cpp's server out of the package xllamacpp; the checkpoint becomes a GGUF file beside it."""
    import xllamacpp as library

    weights = Path(setup.folder) / "model.gguf"
    if not weights.exists():
        program = Path(__file__).with_name("gguf_file.py")
        converter = await asyncio.create_subprocess_exec(sys.executable, program, setup.folder, weights)
        if await converter.wait():
            raise RuntimeError("the checkpoint could not be written as GGUF, as above")
    params = library.CommonParams()
    params.model.path = str(weights)
    params.n_parallel, params.kv_unified = setup.max_seqs, True
    params.n_ctx, params.port, params.warmup = setup.pool_tokens, 0, True
    params.cache_ram_mib = setup.host_bytes >> 20
    params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = library.Server(params)
    threads = ThreadPoolExecutor(setup.max_seqs)

    def stream(request: Request, put: Callable[[Sequence[int]], object]) -> None:
        body = {"prompt": request.prompt, "n_predict": request.output, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_tokens": True, "cache_prompt": True}
        to = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(body).encode())
        with urllib.request.urlopen(to) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    put(json.loads(line[6:])["tokens"])

    room, free = asyncio.Condition(), setup.pool_tokens

    async def change(tokens: int) -> None:
        """Free tokens, or take them once there are so many."""
        nonlocal free
        async with room:
            await room.wait_for(lambda: free + tokens >= 0)
            free += tokens
            room.notify_all()

    async def generate(request: Request) -> AsyncIterator[Sequence[int]]:
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Sequence[int] | None]()
        put = lambda ids: loop.call_soon_threadsafe(parts.put_nowait, ids)  # noqa: E731
        need = len(request.prompt) + request.output
        await change(-need)  # for it fails all requests once their contexts do not fit together
        done = loop.run_in_executor(threads, stream, request, put)
        done.add_done_callback(lambda _: parts.put_nowait(None))
        while (ids := await parts.get()) is not None:
            if ids:
                yield ids
        await done
        await change(need)

    instructions = library.get_system_info().partition(":")[2].replace(" = 1 ", "").replace("|", "").split()
    return generate, library.__version__, f"its server, {' '.join(instructions)}, prompt cache in memory"


async def sglang(setup: Setup) -> Engine:
    """Start SGLang. Nobody here has run this yet."""
    import sglang as library

    engine = library.Engine(
        model_path=setup.folder,
        load_format="auto" if setup.has_weights else "dummy",
        skip_tokenizer_init=True,
        dtype=setup.dtype,
        max_running_requests=setup.max_seqs,
        context_length=setup.max_context,
        max_total_tokens=setup.pool_tokens,
    )

    async def generate(request: Request) -> AsyncIterator[Sequence[int]]:
        made = 0
        params = {"max_new_tokens": request.output, "temperature": 0.0, "ignore_eos": True}
        async for output in await engine.async_generate(input_ids=request.prompt, sampling_params=params, stream=True):
            yield output["output_ids"][made:]
            made = len(output["output_ids"])

    return generate, library.__version__, "radix cache"


ENGINES: dict[str, Callable[[Setup], Awaitable[Engine]]] = {
    "astraea": astraea,
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "transformers": transformers,
    "sglang": sglang,
}


# -- the process ----------------------------------------------------------------------------------------------------


async def work(name: str, setup: Setup, tell: Callable[[object], None]) -> None:
    """Start an engine, then serve every load of standard input."""
    began = time.perf_counter()
    try:
        generate, number, note = await ENGINES[name](setup)
    except ModuleNotFoundError as error:
        tell({"missing": error.name})
        return
    small = Load([[[1 + i] * 32, [3 + i] * 8] for i in range(2)], [4, 4])
    await serve(generate, small, "first")
    tell(asdict(Ready(number, note, time.perf_counter() - began)))
    served = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        tell(asdict(await serve(generate, Load(**json.loads(line)), str(served))))
        served += 1


def main() -> None:
    """Run the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("setup", type=Path)
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engines print is no answer

    def tell(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    asyncio.run(work(given.engine, Setup(**json.loads(given.setup.read_text())), tell))
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # what the engine has started may not notice this end
    os._exit(0)  # nor need its threads


if __name__ == "__main__":
    main()
