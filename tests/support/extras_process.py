"""One of two processes that serve a model together; the first draws rows with extras and prints their tokens.

python tests/support/extras_process.py FOLDER COORDINATOR PROCESS
"""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.grammars import EVEN
from support.wide import PROMPTS, TIGHT

from astraea_jax.engine.engine import Engine
from astraea_jax.engine.loading import load_model
from astraea_jax.engine.multiprocess import follow, join
from astraea_jax.engine.sampling import SamplingParams

EXTRAS: list[dict[str, Any]] = [
    {"grammar": EVEN, "temperature": 1.0, "seed": 3},
    {"repetition_penalty": 1.5, "logprobs": 2},
    {"logit_bias": {5: 4.0}, "presence_penalty": 1.0, "grammar": EVEN},
    {"logprobs": 0},
    {},
]


async def said(engine: Engine) -> list[tuple[list[int], list[int]]]:
    """The tokens of every request, and those of which it heard the log-probabilities."""

    async def one(prompt: list[int], more: dict[str, Any]) -> tuple[list[int], list[int]]:
        params = SamplingParams(max_tokens=12, ignore_eos=True, **more)
        deltas = [delta async for delta in engine.generate(prompt, params)]
        told = [one.token_id for delta in deltas for one in delta.logprobs]
        return [token for delta in deltas for token in delta.token_ids], told

    return await asyncio.gather(*map(one, PROMPTS, EXTRAS))


def main(folder: str, coordinator: str, process: str) -> None:
    config = dataclasses.replace(TIGHT, tensor_parallel=4, kv_bytes=TIGHT.kv_bytes // 4)
    join(coordinator, 2, int(process))
    model = load_model(folder, config)
    if process != "0":
        follow(model, config)
        return
    engine = Engine(model.decoder, model.tokenizer, config, model.meshes[0])
    engine.start()
    sys.stdout.write(f"{json.dumps(asyncio.run(said(engine)))}\n")
    engine.shutdown(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
