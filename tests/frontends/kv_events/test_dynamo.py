"""NVIDIA Dynamo's own router core, which Ray's KVAwareRouter uses as well, reads what is published.

It is no dependency: ``pip install --no-deps ai-dynamo-runtime`` (250 MB) lets this run.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import pytest
from support.stub import STUB, stub_engine

from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.frontends.kv_events.flags import published

dynamo = pytest.importorskip("dynamo._core", reason="needs ai-dynamo-runtime, 250 MB, which is no dependency")
FREE = "tcp://127.0.0.1:0"
PARAMS = SamplingParams(max_tokens=1, ignore_eos=True)


def worker(number: int, publisher) -> dict[str, object]:
    """A worker as ``ray.llm`` registers it."""
    names = {"model_name": "m", "tenant_id": "t", "endpoint": f"any://{number}", "worker_id": number}
    sizes = {"block_size": STUB.page_size, "max_num_batched_tokens": STUB.max_step_tokens}
    ranks = {"data_parallel_start_rank": 0, "data_parallel_size": 1, "kv_events_endpoints": {0: publisher.endpoint}}
    return {**names, **sizes, **ranks, "replay_endpoint": publisher.replay}


async def test_dynamo_scores_by_what_is_cached():
    service, prompt = dynamo.SelectionService(indexer_threads=1), [*range(10, 27)]
    engines = [stub_engine(dataclasses.replace(STUB, kv_events=True))[0] for _ in range(2)]
    with contextlib.ExitStack() as stack:
        stack.callback(service.shutdown)
        for number, engine in enumerate(engines):
            stack.callback(engine.shutdown, 0)
            await asyncio.to_thread(engine.start)
            [publisher] = stack.enter_context(published(engine, FREE, FREE))
            await engine.generate(prompt[: 9 * (number + 1) - 1], PARAMS).text()  # before anybody listens
            await service.upsert_worker(worker(number, publisher))

        async def blocks() -> list[int]:
            request = {"model_name": "m", "tenant_id": "t", "token_ids": prompt}
            found = (await service.overlap_scores(request))["workers"]
            return [of["device_blocks"] for of in sorted(found, key=lambda of: of["worker_id"])]

        async def until(expected: list[int]) -> None:
            for number in range(200):
                if (found := await blocks()) == expected:
                    return
                for engine in engines:  # a gap is seen when the next batch comes
                    await engine.generate([40, number % 40, 41, 42, 43], PARAMS).text()
                await asyncio.sleep(0.02)
            pytest.fail(f"{found} instead of {expected}")

        await until([2, 4])
        for number in range(8):  # takes every page of the second one
            await engines[1].generate([number] * 40, PARAMS).text()
        await until([2, 0])
